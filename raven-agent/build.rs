//! Builds the eBPF object with whichever toolchain is there, and hands its path to the crate, which embeds it.

use std::{env, path::PathBuf};

#[path = "../raven-ebpf/toolchain.rs"]
mod toolchain;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest.parent().ok_or("raven-agent has no parent folder")?;
    for path in ["raven-ebpf/src", "raven-ebpf/Cargo.toml", "raven-ebpf/toolchain.rs", "raven-common/src", "Cargo.lock"]
    {
        println!("cargo:rerun-if-changed={}", workspace.join(path).display());
    }
    println!("cargo:rerun-if-env-changed=RAVEN_EBPF_RUSTC");
    // Beside the host's build, shared by all its profiles: target/ebpf.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is not inside a target folder")?.join("ebpf");
    let toolchain = toolchain::find()?;
    let status = toolchain::command(&toolchain, workspace, &target, false).status()?;
    if !status.success() {
        return Err(format!(
            "building raven-ebpf with {toolchain} failed; `cargo xtask setup` checks the tools that it needs"
        )
        .into());
    }
    println!("cargo:rustc-env=RAVEN_EBPF_OBJECT={}", toolchain::object(&target).display());
    Ok(())
}
