//! Runs cargo from programs that cargo has started: `cargo xtask` and tests.

use std::env;
use std::process::Command;

/// Returns a cargo command that does not depend on the package of the calling program. Build scripts that depend on
/// such variables (ring's) would else run again, and all crates above them be compiled again, at each change between
/// the shell, `cargo xtask` and a test.
pub fn command() -> Command {
    let mut cargo = Command::new("cargo");
    let of_a_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_str().is_some_and(of_a_package)) {
        cargo.env_remove(name);
    }
    cargo
}

#[cfg(test)]
mod tests {
    #[test]
    fn variables_of_this_package_are_removed() {
        let cargo = super::command();
        let removed = |wanted: &str| cargo.get_envs().any(|(name, value)| name == wanted && value.is_none());
        assert!(removed("CARGO_PKG_NAME") && removed("CARGO_MANIFEST_DIR") && !removed("PATH"), "{cargo:?}");
    }
}
