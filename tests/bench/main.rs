//! The benchmarks behind `cargo xtask bench`: ratios against a baseline that is measured in the same run.
//!
//! [`transit`] measures a gateway node's hop in isolation ([`hop`] is its setup), [`tunnel`] two gateway nodes end to
//! end, [`engine`] the userspace WireGuard engine ([`iperf`] measures both), [`proxy`] the L7 proxy ([`konnectivity`] for comparison), [`planning`] the cost of `plan()`, [`cost`] what an edge
//! node receives, [`memory`] the resident memory of the programs.

#![forbid(unsafe_code)]

mod cost;
mod engine;
mod hop;
mod iperf;
mod konnectivity;
mod memory;
mod planning;
mod proxy;
mod transit;
mod tunnel;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Run a benchmark and print a table or JSON.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Ignored; `cargo bench` passes it to every benchmark.
    #[arg(long, global = true, hide = true)]
    bench: bool,
    /// Print only JSON on standard output.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Measure packets per CPU-second of a gateway node's hop, against the kernel's forwarding.
    Transit {
        /// Path of the generator's object (`raven-bench` beside the eBPF object).
        #[arg(long)]
        object: PathBuf,
        /// Number of measurements of each variant; the median counts.
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
    /// Measure throughput between two gateway nodes, against bare WireGuard between the same two.
    Tunnel {
        /// Number of measurements of each variant, alternating; the median counts.
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
    /// Measure the userspace WireGuard engine, against wireguard-go between the same two hosts.
    Engine {
        /// Number of measurements of each variant, alternating; the median counts.
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
    /// Measure proxy streams against a direct TCP connection.
    Proxy {
        /// Number of measurements of each variant, alternating; the median counts.
        #[arg(long, default_value_t = 3)]
        runs: usize,
    },
    /// Measure the cost of `plan()` at 100, 1,000 and 10,000 nodes.
    Plan,
    /// Measure what an edge agent receives from the API server as the number of sites grows, and what an idle site costs.
    Cost,
    /// Measure the resident memory of agent and controller.
    Memory,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let _ = arguments.bench;
    match arguments.command {
        Command::Transit { object, runs } => transit::run(&object, runs, arguments.json),
        Command::Tunnel { runs } => tunnel::run(runs, arguments.json),
        Command::Engine { runs } => engine::run(runs, arguments.json),
        Command::Proxy { runs } => proxy::run(runs, arguments.json),
        Command::Plan => planning::run(arguments.json),
        Command::Cost => cost::run(arguments.json),
        Command::Memory => memory::run(arguments.json),
    }
}

/// Returns the median of the ratios of values to those of the baseline, run by run.
fn median_ratio(values: &[f64], baseline: &[f64]) -> f64 {
    median(&values.iter().zip(baseline).map(|(value, baseline)| value / baseline).collect::<Vec<_>>())
}

/// Returns the median; for an even number of values, the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}
