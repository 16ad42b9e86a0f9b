//! Builds the programs that labs run, in the profile that xtask itself was built in.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{build_ebpf, toolchain, workspace};

/// `raven-agent` (with the eBPF object in it) and `raven-controller`, beside xtask.
pub(crate) fn binaries() -> Result<()> {
    cargo_build(&["-p", "raven-agent", "-p", "raven-controller"])
}

/// The object whose programs log, for tests in which other programs take over from them.
pub(crate) fn tracing_object() -> Result<()> {
    let toolchain = toolchain::find().map_err(anyhow::Error::msg)?;
    build_ebpf::build(&toolchain, true).map(drop)
}

/// The tests that run inside a virtual machine.
pub(crate) fn vm_tests() -> Result<()> {
    cargo_build(&["-p", "raven-tests", "--bin", "raven-vm-tests"])
}

fn cargo_build(what: &[&str]) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(workspace()).args(["build", "--quiet"]).args(what);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    // Standard output may be somebody's JSON.
    let status = cargo.stdout(std::io::stderr()).status().context("start cargo")?;
    ensure!(status.success(), "cargo build failed");
    Ok(())
}
