//! `cargo xtask build-ebpf`: builds the eBPF object.
//!
//! The build script of raven-agent builds the same object with the same code (`raven-ebpf/toolchain.rs`) and embeds it.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{
    progress,
    setup::{self, Need},
    target_dir, toolchain, workspace,
};

/// Arguments of `build-ebpf`.
#[derive(clap::Args)]
pub(crate) struct BuildEbpf {
    /// Build programs that log each packet, into target/ebpf-trace, for `raven-agent --ebpf-object`.
    #[arg(long)]
    trace: bool,
}

impl BuildEbpf {
    /// Builds the object and prints toolchain, path and size.
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(&[Need::Ebpf])?;
        let toolchain = toolchain::find().map_err(anyhow::Error::msg)?;
        println!("toolchain: {toolchain}");
        let object = build(&toolchain, self.trace)?;
        let size = object.metadata().with_context(|| format!("read the size of {}", object.display()))?.len();
        println!("object: {} ({size} bytes)", object.display());
        Ok(())
    }
}

/// Builds the object and returns its path.
pub(crate) fn build(toolchain: &toolchain::Toolchain, trace: bool) -> Result<PathBuf> {
    let target = target_dir().join(if trace { "ebpf-trace" } else { "ebpf" });
    let text = if trace { "building the eBPF programs with logging" } else { "building the eBPF programs" };
    progress::run(text, &mut toolchain::command(toolchain, &workspace(), &target, trace))?;
    Ok(toolchain::object(&target))
}
