//! The list of an image's components (SBOM) in CycloneDX 1.5 JSON: crates that are linked, and Debian packages.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use anyhow::{Context, Result};
use cargo_metadata::{Metadata, MetadataCommand, Package as Crate};
use serde_json::{Value, json};

use super::{
    Program,
    commit::Commit,
    machine::{Machine, Package},
};
use crate::{debian_kernel::output_of, workspace};

/// The image that a list describes.
pub(crate) struct Sbom<'a> {
    /// Its program.
    pub(crate) program: &'a Program,
    /// Name and tag of the image.
    pub(crate) reference: &'a str,
    /// Digest of the manifest.
    pub(crate) digest: &'a str,
    /// The commit from which the program was compiled.
    pub(crate) commit: &'a Commit,
    /// The system for which it was compiled.
    pub(crate) machine: &'a Machine,
}

impl Sbom<'_> {
    /// Returns the document. Equal images have equal documents: the serial number is derived from the digest.
    pub(crate) fn document(&self, packages: &BTreeSet<Package>) -> Result<Vec<u8>> {
        let crates = crates(self.program, self.machine.arch.triple())?;
        let distribution = distribution(self.machine)?;
        let components: Vec<Value> = crates
            .iter()
            .map(|(key, found)| crate_component(key, found))
            .chain(packages.iter().map(|package| package_component(package, &distribution)))
            .collect();
        let document = json!({
            "bomFormat": "CycloneDX",
            "specVersion": "1.5",
            "serialNumber": format!("urn:uuid:{}", uuid(self.digest)),
            "version": 1,
            "metadata": self.metadata()?,
            "components": components,
        });
        let mut bytes = serde_json::to_vec_pretty(&document)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    fn metadata(&self) -> Result<Value> {
        let compiler = output_of(Command::new("rustc").arg("--version").current_dir(workspace()))?;
        let tool = |name: &str, version: &str| json!({ "type": "application", "name": name, "version": version });
        Ok(json!({
            "timestamp": self.commit.time.to_string(),
            "tools": { "components": [tool("cargo xtask image", env!("CARGO_PKG_VERSION")), tool("rustc", compiler.trim())] },
            "component": {
                "type": "container",
                "bom-ref": self.reference,
                "name": self.reference.rsplit_once(':').map_or(self.reference, |(name, _)| name),
                "version": self.digest,
                "hashes": [{ "alg": "SHA-256", "content": hex(self.digest) }],
                "properties": [
                    { "name": "org.opencontainers.image.ref.name", "value": self.reference },
                    { "name": "org.opencontainers.image.revision", "value": self.commit.revision },
                ],
            },
        }))
    }
}

/// Name and version of a crate.
type Key = (String, String);

/// Returns the crates whose code is in a program compiled for `triple`, including the crates of what it embeds.
fn crates(program: &Program, triple: &str) -> Result<BTreeMap<Key, Crate>> {
    let metadata: Metadata = MetadataCommand::new()
        .current_dir(workspace())
        .other_options(["--locked", "--filter-platform", triple].map(str::to_owned))
        .exec()?;
    let mut known: BTreeMap<Key, Crate> = metadata
        .packages
        .into_iter()
        .map(|found| ((found.name.to_string(), found.version.to_string()), found))
        .collect();
    let mut linked = linked(program.name, triple)?;
    for embedded in program.embeds {
        linked.extend(self::linked(embedded.name, embedded.target)?);
    }
    let describe = |key: Key| {
        let found = known.remove(&key).with_context(|| format!("cargo metadata lacks {} {}", key.0, key.1))?;
        Ok((key, found))
    };
    linked.into_iter().map(describe).collect()
}

/// Returns the crates that are linked into a program. `cargo metadata` resolves features for the whole workspace, tests
/// included; `cargo tree` resolves them for this program, as its build does.
fn linked(program: &str, triple: &str) -> Result<BTreeSet<Key>> {
    let mut tree = raven_tests::cargo::command();
    tree.current_dir(workspace()).args(["tree", "--locked", "--package", program, "--target", triple]);
    tree.args(["--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}"]);
    output_of(&mut tree)?.lines().filter(|line| !line.is_empty()).map(key).collect()
}

/// Parses a line of `cargo tree`: `raven-agent v0.1.0 (/src/raven-agent)`.
fn key(line: &str) -> Result<Key> {
    let mut words = line.split_whitespace();
    let (name, version) = (words.next(), words.next().and_then(|word| word.strip_prefix('v')));
    let (name, version) = name.zip(version).with_context(|| format!("cargo tree printed `{line}`"))?;
    Ok((name.to_owned(), version.to_owned()))
}

fn crate_component((name, version): &Key, found: &Crate) -> Value {
    let url = format!("pkg:cargo/{name}@{}", escape(version));
    let mut component = json!({ "type": "library", "bom-ref": url, "name": name, "version": version, "purl": url });
    if let Some(license) = &found.license {
        // Older crates separate alternatives with a slash, which is not an SPDX expression.
        component["licenses"] = json!([{ "expression": license.replace('/', " OR ") }]);
    }
    component
}

/// A Debian release, such as `debian` and `12`.
struct Distribution {
    id: String,
    version: String,
}

/// Reads the name of a system's distribution (os-release(5)).
fn distribution(machine: &Machine) -> Result<Distribution> {
    let path = machine.outside("/etc/os-release".as_ref());
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    Ok(Distribution { id: value("ID"), version: value("VERSION_ID") })
}

fn package_component(package: &Package, distribution: &Distribution) -> Value {
    let Package { name, version, arch } = package;
    let Distribution { id, version: release } = distribution;
    let url = format!("pkg:deb/{id}/{}@{}?arch={arch}&distro={id}-{release}", escape(name), escape(version));
    json!({ "type": "library", "bom-ref": url, "name": name, "version": version, "purl": url })
}

/// Percent-encodes a part of a package URL.
fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte);
    let encode = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(encode).collect()
}

fn hex(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

/// Returns a UUID of version 8 (RFC 9562, section 5.8) made from the first bits of a digest.
fn uuid(digest: &str) -> String {
    let hex = hex(digest);
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-8{}-8{}-{}", part(0, 8), part(8, 12), part(13, 16), part(17, 20), part(20, 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_are_parsed_from_the_output_of_cargo_tree() {
        let expected = ("raven-agent".to_owned(), "0.1.0".to_owned());
        assert_eq!(key("raven-agent v0.1.0 (/src/raven-agent)").expect("a crate"), expected);
        assert_eq!(key("raven-agent v0.1.0 (*)").expect("a crate"), expected);
        key("raven-agent").expect_err("no version");
    }

    #[test]
    fn serial_number_is_derived_from_the_digest() {
        let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert_eq!(uuid(&digest), "01234567-89ab-8def-8123-456789abcdef");
    }

    #[test]
    fn package_urls_are_escaped() {
        assert_eq!(escape("1:2.36-9+deb12u1~x"), "1:2.36-9%2Bdeb12u1~x");
        let package = Package { name: "libstdc++6".into(), version: "12.2.0-14".into(), arch: "amd64".into() };
        let distribution = Distribution { id: "debian".to_owned(), version: "12".to_owned() };
        let component = package_component(&package, &distribution);
        assert_eq!(component["purl"], "pkg:deb/debian/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=debian-12");
    }

    #[test]
    fn only_linked_crates_are_listed() {
        let controller = &super::super::PROGRAMS[1];
        let names: BTreeSet<String> =
            crates(controller, "x86_64-unknown-linux-gnu").expect("crates").into_keys().map(|key| key.0).collect();
        for linked in ["raven-controller", "raven-api", "kube", "tokio"] {
            assert!(names.contains(linked), "{linked}");
        }
        for not_linked in ["proptest", "clap_derive", "cc", "aya", "xtask"] {
            assert!(!names.contains(not_linked), "{not_linked}");
        }
    }
}
