//! The benchmarks behind `cargo xtask bench`: ratios against a baseline that is measured in the same run.
//!
//! [`transit`] measures a gateway node's hop by itself ([`hop`] is its set-up), [`tunnel`] two gateway nodes end to
//! end, [`proxy`] the L7 tunnel ([`konnectivity`] is what it is compared with), [`planning`] what `plan()` costs,
//! [`memory`] what the programs keep resident.

#![forbid(unsafe_code)]

mod hop;
mod konnectivity;
mod memory;
mod planning;
mod proxy;
mod transit;
mod tunnel;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures; a table on standard output, or JSON.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// What `cargo bench` says to every bench.
    #[arg(long, global = true, hide = true)]
    bench: bool,
    /// JSON on standard output, and nothing else.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// A gateway node's hop: packets per CPU-second, against the kernel's ways.
    Transit {
        /// The generator's object (`raven-bench` beside the eBPF object).
        #[arg(long)]
        object: PathBuf,
        /// How often each variant is measured; the median counts.
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
    /// Throughput between two gateway nodes, against bare WireGuard between the same two.
    Tunnel {
        /// How often each way is measured, in turn; the median counts.
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
    /// The L7 tunnel, against a direct TCP connection.
    Proxy {
        /// How often each way is measured, in turn; the median counts.
        #[arg(long, default_value_t = 3)]
        runs: usize,
    },
    /// What `plan()` costs, at 100, 1,000 and 10,000 nodes.
    Plan,
    /// What agent and controller keep resident.
    Memory,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let _ = arguments.bench;
    match arguments.command {
        Command::Transit { object, runs } => transit::run(&object, runs, arguments.json),
        Command::Tunnel { runs } => tunnel::run(runs, arguments.json),
        Command::Proxy { runs } => proxy::run(runs, arguments.json),
        Command::Plan => planning::run(arguments.json),
        Command::Memory => memory::run(arguments.json),
    }
}

/// The middle one, or the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}
