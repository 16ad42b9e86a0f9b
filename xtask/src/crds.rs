//! `cargo xtask crds`: writes the CRD manifests from the Rust types; with `--check` compares them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Returns the folder of the manifests.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join("crds")
}

/// Arguments of `crds`.
#[derive(clap::Args)]
pub(crate) struct Crds {
    /// Write nothing; fail if a manifest differs from the types.
    #[arg(long)]
    check: bool,
}

impl Crds {
    /// Writes or compares the manifests.
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
        let name = crd.metadata.name.clone().context("a CRD has no name")?;
        // Through JSON, which is the wire format of the Kubernetes types.
        let body = serde_saphyr::to_string(&serde_json::to_value(&crd)?)?;
        let text = format!(
            "# Written by `cargo xtask crds` from raven-api; change the types, not this file.\n{}\n",
            body.trim_end()
        );
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
    for stale in unknown_files(wanted)? {
        fs::remove_file(&stale)?;
        println!("{} removed: no type defines it", stale.display());
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
    differences.extend(unknown_files(wanted)?.iter().map(|path| format!("{}: no type defines it", path.display())));
    if differences.is_empty() {
        println!("the CRDs in deploy/crds/ match the Rust types");
        return Ok(());
    }
    bail!("deploy/crds/ differs from the Rust types; run `cargo xtask crds`:\n{}", differences.join("\n"))
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
    Some(format!("line {}: the file has `{}`, the types require `{}`", equal + 1, line(found), line(wanted)))
}

/// Returns the files in the folder that belong to no CRD.
fn unknown_files(wanted: &[Manifest]) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(folder()) else {
        return Ok(Vec::new());
    };
    let mut unknown_files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "yaml") && wanted.iter().all(|m| m.path != path) {
            unknown_files.push(path);
        }
    }
    Ok(unknown_files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difference_is_reported_with_its_line() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("", "a\n").as_deref(), Some("missing"));
        let hint = first_difference("a\nb\n", "a\nc\n");
        assert_eq!(hint.as_deref(), Some("line 2: the file has `b`, the types require `c`"));
        let shorter = first_difference("a\n", "a\nc\n");
        assert_eq!(shorter.as_deref(), Some("line 2: the file has `(the end)`, the types require `c`"));
    }

    #[test]
    fn manifests_parse_as_the_same_crds() {
        let written = manifests().expect("build the manifests");
        let crds = raven_api::schema::crds().expect("build the CRDs");
        assert_eq!(written.len(), crds.len());
        for (manifest, crd) in written.iter().zip(crds) {
            let back: serde_json::Value = serde_saphyr::from_str(&manifest.text).expect("parse the YAML");
            assert_eq!(back, serde_json::to_value(&crd).expect("convert to JSON"));
        }
    }
}
