//! `cargo xtask crds`: writes the CRD manifests from the Rust types; with `--check` only compares.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Where the manifests lie.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join("crds")
}

/// Arguments of `crds`.
#[derive(clap::Args)]
pub(crate) struct Crds {
    /// Write nothing; fail if the files differ from the types.
    #[arg(long)]
    check: bool,
}

impl Crds {
    /// Writes or compares.
    pub(crate) fn run(self) -> Result<()> {
        let wanted = manifests()?;
        if self.check { check(&wanted) } else { write(&wanted) }
    }
}

struct Manifest {
    path: PathBuf,
    text: String,
}

fn manifests() -> Result<Vec<Manifest>> {
    let mut manifests = Vec::new();
    for crd in raven_api::schema::crds()? {
        let name = crd.metadata.name.clone().context("a CRD has a name")?;
        // By way of JSON: the Kubernetes types know their wire form there best.
        let body = serde_saphyr::to_string(&serde_json::to_value(&crd)?)?;
        let text = format!("# Written by `cargo xtask crds` from raven-api; change the types, not this file.\n{}\n", body.trim_end());
        manifests.push(Manifest { path: folder().join(format!("{name}.yaml")), text });
    }
    Ok(manifests)
}

fn write(wanted: &[Manifest]) -> Result<()> {
    fs::create_dir_all(folder())?;
    for manifest in wanted {
        fs::write(&manifest.path, &manifest.text).with_context(|| format!("write {}", manifest.path.display()))?;
        println!("{}", manifest.path.display());
    }
    for stale in strangers(wanted)? {
        fs::remove_file(&stale)?;
        println!("{} removed: no type has it any more", stale.display());
    }
    Ok(())
}

fn check(wanted: &[Manifest]) -> Result<()> {
    let mut differences = Vec::new();
    for manifest in wanted {
        let found = fs::read_to_string(&manifest.path).unwrap_or_default();
        if let Some(hint) = first_difference(&found, &manifest.text) {
            differences.push(format!("{}: {hint}", manifest.path.display()));
        }
    }
    differences.extend(strangers(wanted)?.iter().map(|path| format!("{}: no type has it any more", path.display())));
    if differences.is_empty() {
        println!("the CRDs in deploy/crds/ are those of the types");
        return Ok(());
    }
    bail!("deploy/crds/ is not what the types say; run `cargo xtask crds`:\n{}", differences.join("\n"))
}

fn first_difference(found: &str, wanted: &str) -> Option<String> {
    if found == wanted {
        return None;
    }
    if found.is_empty() {
        return Some("missing".to_owned());
    }
    let equal = found.lines().zip(wanted.lines()).take_while(|(a, b)| a == b).count();
    let line = |text: &str| text.lines().nth(equal).unwrap_or("(the end)").trim().to_owned();
    Some(format!("line {}: the file has `{}`, the types say `{}`", equal + 1, line(found), line(wanted)))
}

/// Files in the folder that no CRD is written to.
fn strangers(wanted: &[Manifest]) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(folder()) else {
        return Ok(Vec::new());
    };
    let mut strangers = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "yaml") && wanted.iter().all(|m| m.path != path) {
            strangers.push(path);
        }
    }
    Ok(strangers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_named_by_its_line() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("", "a\n").as_deref(), Some("missing"));
        let hint = first_difference("a\nb\n", "a\nc\n");
        assert_eq!(hint.as_deref(), Some("line 2: the file has `b`, the types say `c`"));
        let shorter = first_difference("a\n", "a\nc\n");
        assert_eq!(shorter.as_deref(), Some("line 2: the file has `(the end)`, the types say `c`"));
    }

    #[test]
    fn manifests_read_back_as_the_same_crds() {
        let written = manifests().expect("the types give manifests");
        let crds = raven_api::schema::crds().expect("the types give CRDs");
        assert_eq!(written.len(), crds.len());
        for (manifest, crd) in written.iter().zip(crds) {
            let back: serde_json::Value = serde_saphyr::from_str(&manifest.text).expect("it is YAML");
            assert_eq!(back, serde_json::to_value(&crd).expect("it is JSON"));
        }
    }
}
