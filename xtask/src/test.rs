//! `cargo xtask test`: everything that this machine can run, and in plain words what it could not.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{
    build,
    kernel::{self, Series},
    setup::{self, Need},
    workspace,
};

/// Arguments of `test`.
#[derive(clap::Args)]
pub(crate) struct Test {
    /// One level; all that this machine can when left out.
    #[arg(value_enum)]
    level: Option<Level>,
    /// The kernel of level `kernel`; all of them when left out.
    #[arg(long, value_enum)]
    kernel: Option<Series>,
}

/// A level of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Level {
    /// Pure code and the laws of plan, diff and election: no privileges.
    Unit,
    /// The eBPF programs, packet by packet, in this kernel. Needs root.
    Bpf,
    /// The lab: pools as namespaces, a real API server, the real binaries. Needs root.
    Lab,
    /// The lab's L3 tests in other kernels, under QEMU.
    Kernel,
}

impl Level {
    const ALL: [Self; 4] = [Self::Unit, Self::Bpf, Self::Lab, Self::Kernel];

    fn needs(self) -> &'static [Need] {
        match self {
            Self::Unit | Self::Bpf => &[Need::Build, Need::Ebpf],
            // Level `kernel` skips what it cannot have: it looks for that itself.
            Self::Kernel => &[],
            Self::Lab => &[Need::Build, Need::Ebpf, Need::Lab, Need::Kubernetes, Need::Kubelet],
        }
    }

    /// Arguments of `cargo test`.
    fn arguments(self) -> &'static [&'static str] {
        match self {
            // raven-ebpf's own code is tested through raven-common, and in the kernel.
            Self::Unit => &["--workspace", "--lib", "--bins", "--exclude", "raven-ebpf"],
            Self::Bpf => &["-p", "raven-tests", "--test", "programs"],
            // One at a time: timing and CPU belong to the lab that is measured.
            Self::Lab => &[
                "--no-fail-fast",
                "-p",
                "raven-tests",
                "--test",
                "lab",
                "--test",
                "control",
                "--test",
                "l3",
                "--test",
                "l7",
                "--",
                "--test-threads=1",
            ],
            Self::Kernel => &[],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Bpf => "bpf",
            Self::Lab => "lab",
            Self::Kernel => "kernel",
        }
    }

    /// Why this machine cannot run it.
    fn obstacle(self) -> Option<String> {
        let root = nix::unistd::geteuid().is_root();
        match self {
            Self::Unit => None,
            Self::Bpf | Self::Lab if !root => Some("it needs root (namespaces and BPF)".to_owned()),
            Self::Bpf | Self::Lab | Self::Kernel => None,
        }
    }
}

/// How a level ended.
enum Outcome {
    Passed,
    Failed,
    Skipped(String),
    /// Kernel by kernel.
    Kernels(Vec<(Series, kernel::Outcome)>),
}

impl Outcome {
    fn failed(&self) -> bool {
        match self {
            Self::Passed | Self::Skipped(_) => false,
            Self::Failed => true,
            Self::Kernels(each) => each.iter().any(|(_, o)| !o.passed() && !matches!(o, kernel::Outcome::Skipped(_))),
        }
    }

    fn skipped(&self) -> bool {
        match self {
            Self::Passed | Self::Failed => false,
            Self::Skipped(_) => true,
            Self::Kernels(each) => each.iter().any(|(_, o)| matches!(o, kernel::Outcome::Skipped(_))),
        }
    }
}

impl Test {
    /// Runs the levels; an error if one failed, or if one was asked for by name and could not be run.
    pub(crate) fn run(self) -> Result<()> {
        if self.kernel.is_some() && self.level != Some(Level::Kernel) {
            bail!("--kernel goes with level `kernel`");
        }
        let levels = self.level.map_or(Level::ALL.to_vec(), |level| vec![level]);
        let mut outcomes = Vec::new();
        for level in levels {
            let outcome = match level.obstacle() {
                Some(why) => Outcome::Skipped(why),
                None if level == Level::Kernel => {
                    Outcome::Kernels(kernel::run(&self.kernel.map_or(Series::ALL.to_vec(), |one| vec![one]))?)
                }
                None => run(level)?,
            };
            outcomes.push((level, outcome));
        }
        report(&outcomes);
        let failed = outcomes.iter().any(|(_, o)| o.failed());
        let refused = self.level.is_some() && outcomes.iter().any(|(_, o)| o.skipped());
        if failed || refused {
            bail!("not all that was asked for passed");
        }
        Ok(())
    }
}

fn run(level: Level) -> Result<Outcome> {
    setup::ensure(level.needs())?;
    if level == Level::Lab {
        build::binaries()?;
        build::tracing_object()?;
    }
    println!("\n=== {} ===", level.name());
    let status = Command::new("cargo").current_dir(workspace()).arg("test").args(level.arguments()).status().context("start cargo test")?;
    Ok(if status.success() { Outcome::Passed } else { Outcome::Failed })
}

fn report(outcomes: &[(Level, Outcome)]) {
    println!("\n=== what was tested ===");
    println!("kernel: {} (this machine's)", kernel());
    println!("API server: {}", api_server());
    for (level, outcome) in outcomes {
        match outcome {
            Outcome::Passed => println!("{:<7} passed", level.name()),
            Outcome::Failed => println!("{:<7} FAILED", level.name()),
            Outcome::Skipped(why) => println!("{:<7} SKIPPED: {why}", level.name()),
            Outcome::Kernels(each) => each.iter().for_each(|(series, o)| println!("{:<7} {series}: {o}", level.name())),
        }
    }
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").map_or("unknown".to_owned(), |r| r.trim().to_owned())
}

fn api_server() -> String {
    let found = raven_tests::kubernetes::binaries::Binaries::find();
    found.ok().flatten().map_or("none".to_owned(), |binaries| format!("kube-apiserver, from {}", binaries.origin))
}
