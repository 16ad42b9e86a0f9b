//! `cargo xtask build-ebpf`: the eBPF object, and what is in it.
//!
//! The ordinary build of raven-agent makes the same object with the same code (`raven-ebpf/toolchain.rs`) and embeds it.

use std::{env, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{
    setup::{self, Need},
    toolchain, workspace,
};

/// Arguments of `build-ebpf`.
#[derive(clap::Args)]
pub(crate) struct BuildEbpf {
    /// Programs that write a line of log for each packet, into a folder of their own (target/ebpf-trace), for `raven-agent --ebpf-object`.
    #[arg(long)]
    trace: bool,
}

impl BuildEbpf {
    /// Builds it.
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(&[Need::Ebpf])?;
        let toolchain = toolchain::find().map_err(anyhow::Error::msg)?;
        println!("toolchain: {toolchain}");
        let object = build(&toolchain, self.trace)?;
        let size = object.metadata().with_context(|| format!("look at {}", object.display()))?.len();
        println!("object: {} ({size} bytes)", object.display());
        Ok(())
    }
}

/// Builds the object, and gives where it is.
pub(crate) fn build(toolchain: &toolchain::Toolchain, trace: bool) -> Result<PathBuf> {
    let target = target_dir().join(if trace { "ebpf-trace" } else { "ebpf" });
    // Standard output may be somebody's JSON.
    let mut cargo = toolchain::command(toolchain, &workspace(), &target, trace);
    let status = cargo.stdout(std::io::stderr()).status().context("start cargo")?;
    ensure!(status.success(), "the build of raven-ebpf failed: {status}");
    Ok(toolchain::object(&target))
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}
