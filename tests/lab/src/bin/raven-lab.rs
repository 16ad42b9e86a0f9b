//! Manages labs for manual work: `raven-lab up`, `raven-lab list`, `raven-lab enter ID NODE`, `raven-lab down ID`.

#![forbid(unsafe_code)]

use clap::Parser;
use raven_tests::cli::{LabCommand, run};

/// Run pools of nodes as network namespaces, with a real API server.
#[derive(Parser)]
#[command(name = "raven-lab")]
struct Arguments {
    #[command(subcommand)]
    command: LabCommand,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    run(Arguments::parse().command).await
}
