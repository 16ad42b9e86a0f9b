//! The project's commands: `cargo xtask COMMAND`. One file per command; here is only the dispatch.

#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod build;
mod build_ebpf;
mod crds;
mod demo;
mod fuzz;
mod kernel;
mod lab;
mod setup;
mod test;
#[path = "../../raven-ebpf/toolchain.rs"]
mod toolchain;

/// Build, try and test Raven.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or install what build and tests need (the other commands call it by themselves).
    Setup(setup::Setup),
    /// Build the eBPF object.
    BuildEbpf(build_ebpf::BuildEbpf),
    /// Three pools that cannot reach each other talk: build, prove, take down.
    Demo(demo::Demo),
    /// Measure, as ratios against a baseline of the same run.
    Bench(bench::Bench),
    /// Fuzz what reads bytes from outside.
    Fuzz(fuzz::Fuzz),
    /// Run all tests that this machine can, or one level of them.
    Test(test::Test),
    /// Write the CRD manifests into deploy/crds/ from the Rust types.
    Crds(crds::Crds),
    /// A lab to work in by hand.
    #[command(subcommand)]
    Lab(raven_tests::cli::LabCommand),
}

/// The project's root.
pub(crate) fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), PathBuf::from)
}

fn main() -> ExitCode {
    match dispatch(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Setup(setup) => setup.run(),
        Command::BuildEbpf(build) => build.run(),
        Command::Demo(demo) => demo.run(),
        Command::Bench(bench) => bench.run(),
        Command::Fuzz(fuzz) => fuzz.run(),
        Command::Test(test) => test.run(),
        Command::Crds(crds) => crds.run(),
        Command::Lab(command) => lab::run(command),
    }
}
