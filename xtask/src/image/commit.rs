//! The commit from which images are built: revision, time and labels.

use std::{collections::BTreeMap, env, process::Command};

use anyhow::{Context, Result};
use jiff::Timestamp;

use super::Program;
use crate::{debian_kernel::output_of, workspace};

/// Repository of the sources, for labels.
const SOURCE: &str = "https://github.com/openyurtio/raven";

/// The checked-out commit.
pub(crate) struct Commit {
    /// Hash, with `-dirty` if files differ from the commit or are unknown to git.
    pub(crate) revision: String,
    /// Time of the commit, or `SOURCE_DATE_EPOCH`.
    pub(crate) time: Timestamp,
}

impl Commit {
    /// Reads the commit of the workspace.
    pub(crate) fn read() -> Result<Self> {
        let hash = git(&["rev-parse", "HEAD"])?;
        let dirty = !git(&["status", "--porcelain"])?.is_empty();
        let seconds = match env::var("SOURCE_DATE_EPOCH") {
            Ok(seconds) => seconds,
            Err(_) => git(&["log", "-1", "--format=%ct"])?,
        };
        Ok(Self { revision: revision(&hash, dirty), time: time(&seconds)? })
    }

    /// Returns the labels of an image: the keys that the OCI image specification defines.
    pub(crate) fn labels(&self, program: &Program) -> BTreeMap<String, String> {
        let labels = [
            ("created", self.time.to_string()),
            ("description", program.description.to_owned()),
            ("licenses", env!("CARGO_PKG_LICENSE").to_owned()),
            ("revision", self.revision.clone()),
            ("source", SOURCE.to_owned()),
            ("title", program.name.to_owned()),
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ];
        labels.into_iter().map(|(key, value)| (format!("org.opencontainers.image.{key}"), value)).collect()
    }
}

fn git(arguments: &[&str]) -> Result<String> {
    let output = output_of(Command::new("git").arg("-C").arg(workspace()).args(arguments));
    let output = output.context("read the commit; images are built from a git checkout")?;
    Ok(output.trim().to_owned())
}

fn revision(hash: &str, dirty: bool) -> String {
    if dirty { format!("{hash}-dirty") } else { hash.to_owned() }
}

fn time(seconds: &str) -> Result<Timestamp> {
    let number: u32 = seconds.trim().parse().with_context(|| format!("time of the commit: `{seconds}`"))?;
    Ok(Timestamp::from_second(number.into())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modified_checkout_is_marked_in_the_revision() {
        assert_eq!(revision("abc", false), "abc");
        assert_eq!(revision("abc", true), "abc-dirty");
    }

    #[test]
    fn time_is_read_in_seconds() {
        assert_eq!(time("1700000000\n").expect("a time").to_string(), "2023-11-14T22:13:20Z");
        time("-1").expect_err("before 1970");
    }
}
