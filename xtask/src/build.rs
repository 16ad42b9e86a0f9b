//! Builds the programs that labs run, in the profile in which xtask itself was built.

use std::process::Command;

use anyhow::Result;

use crate::{
    build_ebpf,
    progress::{self, Task},
    toolchain, workspace,
};

/// Returns the task that builds `raven-agent` (with the eBPF object in it) and `raven-controller` into
/// xtask's own folder.
pub(crate) fn binaries_task() -> Task {
    let name = "building raven-controller and raven-agent, with the eBPF programs";
    Task::new(name, |_| progress::logged(&mut cargo_build(&["-p", "raven-agent", "-p", "raven-controller"])))
}

/// Builds `raven-agent` and `raven-controller`.
pub(crate) fn binaries() -> Result<()> {
    progress::parallel(vec![vec![binaries_task()]])
}

/// Builds the object whose programs log, for tests in which other programs replace the usual ones.
pub(crate) fn tracing_object() -> Result<()> {
    let toolchain = toolchain::find().map_err(anyhow::Error::msg)?;
    build_ebpf::build(&toolchain, true).map(drop)
}

/// Builds the tests that run inside a virtual machine.
pub(crate) fn vm_tests() -> Result<()> {
    progress::run(
        "building the tests for virtual machines",
        &mut cargo_build(&["-p", "raven-tests", "--bin", "raven-vm-tests"]),
    )
}

/// Returns `cargo build` with these arguments, in the profile in which xtask itself was built.
pub(crate) fn cargo_build(arguments: &[&str]) -> Command {
    let mut cargo = raven_tests::cargo::command();
    cargo.current_dir(workspace()).arg("build").args(arguments);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo
}
