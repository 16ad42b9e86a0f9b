//! `cargo xtask bench`: ratios against a baseline measured in the same run. The work is done by `raven-bench` (tests/bench/).

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{
    build_ebpf::target_dir,
    setup::{self, Need},
    toolchain, workspace,
};

/// Arguments of `bench`.
#[derive(clap::Args)]
pub(crate) struct Bench {
    /// What to measure.
    #[arg(value_enum)]
    what: What,
    /// JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
    /// How often each variant of `transit`, `tunnel` and `proxy` is measured.
    #[arg(long, default_value_t = 5)]
    runs: usize,
}

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// A gateway node's hop, against the kernel's ways. Needs root and Linux 5.18.
    Transit,
    /// Throughput between two gateway nodes, against bare WireGuard between the same two. Needs root.
    Tunnel,
    /// The L7 tunnel, against a direct TCP connection. Needs root.
    Proxy,
    /// `plan()`: time and memory at 100, 1,000 and 10,000 nodes.
    Plan,
    /// Resident memory of agent and controller. Needs root.
    Memory,
}

impl Bench {
    /// Builds in release mode and measures.
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(&[Need::Build, Need::Ebpf, Need::Lab, Need::Kubernetes])?;
        build(self.what)?;
        let mut bench = Command::new("cargo");
        bench.current_dir(workspace()).args(["bench", "--quiet", "-p", "raven-tests", "--bench", "raven-bench"]);
        if self.what == What::Transit {
            // What is measured is in the kernel; an optimised build of the measuring program would take minutes for nothing.
            bench.args(["--profile", "dev"]);
        }
        bench.arg("--");
        bench.env("RAVEN_BIN_DIR", target_dir().join("release"));
        match self.what {
            What::Transit => {
                let object = toolchain::object(&target_dir().join("ebpf")).with_file_name("raven-bench");
                bench.args(["transit", "--runs", &self.runs.to_string(), "--object"]).arg(object);
            }
            What::Tunnel => drop(bench.args(["tunnel", "--runs", &self.runs.to_string()])),
            What::Proxy => drop(bench.args(["proxy", "--runs", &self.runs.to_string()])),
            What::Plan => drop(bench.arg("plan")),
            What::Memory => drop(bench.arg("memory")),
        }
        if self.json {
            bench.arg("--json");
        }
        let status = bench.status().context("start raven-bench")?;
        ensure!(status.success(), "raven-bench: {status}");
        Ok(())
    }
}

/// The programs that are measured, and with raven-agent the eBPF objects.
fn build(what: What) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(workspace()).args(["build", "--quiet", "-p", "raven-agent"]);
    if what != What::Transit {
        cargo.args(["--release", "-p", "raven-controller"]);
    }
    // Standard output may be somebody's JSON.
    let status = cargo.stdout(std::io::stderr()).status().context("start cargo")?;
    ensure!(status.success(), "cargo build failed");
    Ok(())
}
