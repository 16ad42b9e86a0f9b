//! The project's commands: `cargo xtask COMMAND`. One file per command; this file only dispatches.

#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod build;
mod build_ebpf;
mod crds;
mod cycles;
mod debian_kernel;
mod demo;
mod fuzz;
mod image;
mod kernel;
mod lab;
mod progress;
mod setup;
mod test;
#[path = "../../raven-ebpf/toolchain.rs"]
mod toolchain;

/// Build, run and test Raven.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what builds and tests need; other commands do this automatically.
    Setup(setup::Setup),
    /// Build the eBPF object.
    BuildEbpf(build_ebpf::BuildEbpf),
    /// Run the demo: connect three isolated pools, check all properties, remove the lab.
    Demo(demo::Demo),
    /// Run a benchmark and print ratios to a baseline of the same run.
    Bench(bench::Bench),
    /// Fuzz code that parses untrusted input.
    Fuzz(fuzz::Fuzz),
    /// Run all tests that this machine supports, or one level of them.
    Test(test::Test),
    /// Write the CRD manifests into deploy/crds/ from the Rust types.
    Crds(crds::Crds),
    /// Make container images of raven-agent and raven-controller, with SBOMs.
    Image(image::Image),
    /// Find import cycles among the modules of each crate.
    Cycles(cycles::Cycles),
    /// Manage labs for manual work.
    #[command(subcommand)]
    Lab(raven_tests::cli::LabCommand),
}

/// Returns the project's root folder.
pub(crate) fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// Returns cargo's target folder.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    progress::init(command.name());
    let result = dispatch(command);
    progress::finish();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Command {
    /// Name of the command and of its log file.
    fn name(&self) -> &'static str {
        match self {
            Self::Setup(_) => "setup",
            Self::Cycles(_) => "cycles",
            Self::BuildEbpf(_) => "build-ebpf",
            Self::Demo(_) => "demo",
            Self::Bench(_) => "bench",
            Self::Fuzz(_) => "fuzz",
            Self::Test(_) => "test",
            Self::Crds(_) => "crds",
            Self::Image(_) => "image",
            Self::Lab(_) => "lab",
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
        Command::Image(image) => image.run(),
        Command::Cycles(_) => cycles::Cycles::run(),
        Command::Lab(command) => lab::run(command),
    }
}
