//! `cargo xtask bench`: prints ratios to a baseline measured in the same run. `raven-bench` (tests/bench/)
//! does the measurements.

use anyhow::{Context, Result, ensure};

use crate::{
    progress,
    setup::{self, Need},
    target_dir, toolchain, workspace,
};

/// Arguments of `bench`.
#[derive(clap::Args)]
pub(crate) struct Bench {
    /// Benchmark to run.
    #[arg(value_enum)]
    what: What,
    /// Print only JSON on standard output.
    #[arg(long)]
    json: bool,
    /// Measure each variant of `transit`, `tunnel`, `engine` and `proxy` this number of times.
    #[arg(long, default_value_t = 5)]
    runs: usize,
}

/// A benchmark to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// A gateway node's hop, against the kernel's forwarding. Requires root and Linux 5.18.
    Transit,
    /// Throughput between two gateway nodes, against bare WireGuard between the same two. Requires root.
    Tunnel,
    /// The userspace WireGuard engine, against wireguard-go. Requires root.
    Engine,
    /// Proxy streams, against a direct TCP connection. Requires root.
    Proxy,
    /// Time and memory of `plan()` at 100, 1,000 and 10,000 nodes.
    Plan,
    /// What an edge agent receives from the API server with 10, 1,000 and 10,000 sites, and what an idle site costs. Requires
    /// root; about half an hour.
    Cost,
    /// Resident memory of agent and controller. Requires root.
    Memory,
}

impl Bench {
    /// Builds in release mode and runs the benchmark.
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(&[Need::Build, Need::Ebpf, Need::Lab, Need::Kubernetes])?;
        if self.what == What::Engine {
            setup::ensure(&[Need::WireguardGo])?;
        }
        build(self.what)?;
        let mut bench = raven_tests::cargo::command();
        bench.current_dir(workspace()).args(["bench", "--quiet", "-p", "raven-tests", "--bench", "raven-bench"]);
        if self.what == What::Transit {
            // The measured code is in the kernel, so an optimised build of the benchmark program has no effect.
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
            What::Engine => drop(bench.args(["engine", "--runs", &self.runs.to_string()])),
            What::Proxy => drop(bench.args(["proxy", "--runs", &self.runs.to_string()])),
            What::Plan => drop(bench.arg("plan")),
            What::Cost => drop(bench.arg("cost")),
            What::Memory => drop(bench.arg("memory")),
        }
        if self.json {
            bench.arg("--json");
        }
        progress::step("building and running raven-bench");
        let status = bench.status().context("start raven-bench")?;
        ensure!(status.success(), "raven-bench: {status}");
        Ok(())
    }
}

/// Builds the programs to measure; raven-agent contains the eBPF objects.
fn build(what: What) -> Result<()> {
    let mut cargo = raven_tests::cargo::command();
    cargo.current_dir(workspace()).args(["build", "-p", "raven-agent"]);
    if what != What::Transit {
        cargo.args(["--release", "-p", "raven-controller"]);
    }
    progress::run("building the programs to measure", &mut cargo)
}
