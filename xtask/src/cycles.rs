//! `cargo xtask cycles`: finds import cycles among the modules of a crate.
//!
//! A submodule is a part of its parent, so imports of an ancestor do not count. Two views are checked: files, and
//! top-level modules with their submodules.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use syn::{
    ItemMod, UseTree,
    visit::{self, Visit},
};

use crate::workspace;

const CRATES: [&str; 7] =
    ["raven-common", "raven-ebpf", "raven-api", "raven-engine", "raven-agent", "raven-controller", "xtask"];

/// Find import cycles among modules.
#[derive(Args)]
pub(crate) struct Cycles;

/// A path of module names from the crate root.
type Module = Vec<String>;
type Graph = BTreeMap<Module, BTreeSet<Module>>;

impl Cycles {
    pub(crate) fn run() -> Result<()> {
        let mut found = Vec::new();
        for name in CRATES {
            let graph = imports(&workspace().join(name).join("src"))?;
            let top = collapse(&graph);
            let cycles = cycles(&graph).into_iter().chain(cycles(&top));
            found.extend(cycles.map(|cycle| {
                format!("{name}: {}", cycle.iter().map(|m| m.join("::")).collect::<Vec<_>>().join(" ↔ "))
            }));
            println!("{name}: {} modules, {} imports", graph.len(), graph.values().map(BTreeSet::len).sum::<usize>());
        }
        ensure!(found.is_empty(), "import cycles:\n{}", found.join("\n"));
        println!("no import cycles");
        Ok(())
    }
}

/// Which module imports which, by the files below `src`. Test modules are left out.
fn imports(src: &Path) -> Result<Graph> {
    let mut sources = BTreeMap::new();
    read(src, src, &mut sources)?;
    let modules: BTreeSet<Module> = sources.keys().cloned().collect();
    Ok(sources
        .into_iter()
        .map(|(module, file)| {
            let mut paths = Paths { module: &module, found: Vec::new() };
            paths.visit_file(&file);
            let imported = paths.found.into_iter().filter_map(|path| longest(&modules, path));
            let imported = imported.filter(|other| !module.starts_with(other)).collect();
            (module, imported)
        })
        .collect())
}

fn read(src: &Path, folder: &Path, sources: &mut BTreeMap<Module, syn::File>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "bin") {
                read(src, &path, sources)?;
            }
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let module = path
            .with_extension("")
            .strip_prefix(src)?
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect::<Module>();
        if module.iter().any(|part| part == "tests" || part == "fixture" || part == "main") {
            continue;
        }
        let module = if module == ["lib"] { Module::new() } else { module };
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        sources.insert(module, syn::parse_file(&text).with_context(|| format!("parse {}", path.display()))?);
    }
    Ok(())
}

/// The module that a path leads to: its longest prefix that is one.
fn longest(modules: &BTreeSet<Module>, mut path: Module) -> Option<Module> {
    while !path.is_empty() {
        if modules.contains(&path) {
            return Some(path);
        }
        path.pop();
    }
    None
}

/// Collects absolute paths within the crate.
struct Paths<'a> {
    module: &'a [String],
    found: Vec<Module>,
}

impl Paths<'_> {
    /// Makes a path absolute, or drops it if it does not start with `crate`, `self` or `super`.
    fn add(&mut self, segments: &[String]) {
        let mut base = self.module.to_vec();
        let mut rest = segments;
        match segments.first().map(String::as_str) {
            Some("crate") => {
                base.clear();
                rest = &segments[1..];
            }
            Some("self") => rest = &segments[1..],
            // `super`, or the name of a submodule.
            Some(_) => {}
            None => return,
        }
        while rest.first().is_some_and(|segment| segment == "super") {
            base.pop();
            rest = &rest[1..];
        }
        base.extend(rest.iter().cloned());
        self.found.push(base);
    }

    fn add_tree(&mut self, prefix: &[String], tree: &UseTree) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.add_tree(&with(&path.ident), &path.tree),
            UseTree::Name(name) => self.add(&with(&name.ident)),
            UseTree::Rename(rename) => self.add(&with(&rename.ident)),
            UseTree::Glob(_) => self.add(prefix),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_tree(prefix, tree)),
        }
    }
}

impl<'ast> Visit<'ast> for Paths<'_> {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if segments.len() > 1 {
            self.add(&segments);
        }
        visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        let test = item.attrs.iter().any(|attribute| {
            attribute.path().is_ident("cfg")
                && attribute.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"))
        });
        if !test {
            visit::visit_item_mod(self, item);
        }
    }
}

/// The same graph with every module replaced by its top-level module. The crate root is left out:
/// it connects everything.
fn collapse(graph: &Graph) -> Graph {
    let top = |module: &Module| module[..1].to_vec();
    let mut collapsed = Graph::new();
    for (module, imported) in graph.iter().filter(|(module, _)| !module.is_empty()) {
        let others = imported.iter().filter(|other| !other.is_empty()).map(top).filter(|other| *other != top(module));
        collapsed.entry(top(module)).or_default().extend(others);
    }
    collapsed
}

/// The groups of modules that reach each other (strongly connected components with more than one module).
fn cycles(graph: &Graph) -> Vec<BTreeSet<Module>> {
    let reachable: BTreeMap<&Module, BTreeSet<&Module>> =
        graph.keys().map(|module| (module, reach(graph, module))).collect();
    let mut groups = BTreeSet::new();
    for (module, others) in &reachable {
        let group: BTreeSet<Module> = others
            .iter()
            .filter(|other| reachable.get(*other).is_some_and(|back| back.contains(module)))
            .map(|m| (*m).clone())
            .collect();
        if group.len() > 1 {
            groups.insert(group);
        }
    }
    groups.into_iter().collect()
}

fn reach<'a>(graph: &'a Graph, from: &'a Module) -> BTreeSet<&'a Module> {
    let mut seen = BTreeSet::new();
    let mut next = vec![from];
    while let Some(module) = next.pop() {
        for other in graph.get(module).into_iter().flatten() {
            if seen.insert(other) {
                next.push(other);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(module: &[&str], text: &str) -> Vec<String> {
        let module: Module = module.iter().map(|part| (*part).to_owned()).collect();
        let mut paths = Paths { module: &module, found: Vec::new() };
        paths.visit_file(&syn::parse_file(text).expect("Rust"));
        paths.found.iter().map(|path| path.join("::")).collect()
    }

    #[test]
    fn paths_are_made_absolute_and_tests_are_left_out() {
        assert_eq!(paths(&["a", "b"], "use crate::{c::D, e};"), ["c::D", "e"]);
        assert_eq!(paths(&["a", "b"], "use super::{c, super::d::E};"), ["a::c", "d::E"]);
        assert_eq!(paths(&["a"], "pub use self::b::C; fn f() { crate::x::y(); }"), ["a::b::C", "x::y"]);
        assert_eq!(paths(&["a"], "#[cfg(test)] mod tests { use crate::x; }"), Vec::<String>::new());
    }

    #[test]
    fn modules_that_reach_each_other_are_a_cycle() {
        let module = |name: &str| vec![name.to_owned()];
        let graph = |edges: &[(&str, &str)]| {
            let mut graph = Graph::new();
            for (from, to) in edges {
                graph.entry(module(from)).or_default().insert(module(to));
                graph.entry(module(to)).or_default();
            }
            graph
        };
        assert_eq!(cycles(&graph(&[("a", "b"), ("b", "c")])), Vec::new());
        let found = cycles(&graph(&[("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]));
        assert_eq!(found, [BTreeSet::from([module("a"), module("b"), module("c")])]);
    }
}
