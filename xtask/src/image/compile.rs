//! Compiles the programs of the images.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::machine::Machine;
use crate::{progress, target_dir, toolchain, workspace};

/// The profile in Cargo.toml.
const PROFILE: &str = "image";

/// Compiles the programs for the machine. Returns the folder that contains them.
pub(crate) fn programs(names: &[&str], machine: &Machine) -> Result<PathBuf> {
    let triple = machine.arch.triple();
    let mut cargo = raven_tests::cargo::command();
    cargo.current_dir(workspace()).args(["build", "--locked", "--profile", PROFILE, "--target", triple]);
    names.iter().for_each(|name| _ = cargo.args(["--package", name]));
    let target = std::path::absolute(target_dir())?;
    cargo.env(
        "CARGO_ENCODED_RUSTFLAGS",
        flags(&workspace(), toolchain::cargo_home().as_deref(), &target).join("\u{1f}"),
    );
    if !machine.is_native() {
        // The linker; build scripts that compile C find the same compiler by the triple.
        cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc");
    }
    progress::run(&format!("compiling {} (several minutes)", names.join(" and ")), &mut cargo)?;
    Ok(target.join(triple).join(PROFILE))
}

/// Returns compiler flags with which the programs do not depend on the paths of the checkout, of cargo's folder and of
/// the target folder.
fn flags(workspace: &Path, cargo: Option<&Path>, target: &Path) -> Vec<String> {
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let mut flags = vec![remap(workspace, "/raven")];
    flags.extend(cargo.map(|home| remap(home, "/cargo")));
    if !target.starts_with(workspace) {
        flags.push(remap(target, "/raven/target"));
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_paths_of_the_build_are_remapped() {
        let inside = flags(Path::new("/src"), Some(Path::new("/home/.cargo")), Path::new("/src/target"));
        assert_eq!(inside, ["--remap-path-prefix=/src=/raven", "--remap-path-prefix=/home/.cargo=/cargo"]);
        let outside = flags(Path::new("/src"), None, Path::new("/tmp/target"));
        assert_eq!(outside, ["--remap-path-prefix=/src=/raven", "--remap-path-prefix=/tmp/target=/raven/target"]);
    }
}
