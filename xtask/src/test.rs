//! `cargo xtask test`: runs all tests that this machine supports and reports the others as skipped.

use anyhow::{Context, Result, bail};
use raven_tests::kubernetes::binaries::{API_SERVER, OLDEST};

use crate::{
    build,
    debian_kernel::Series,
    image,
    kernel::{self, Scope},
    setup::{self, Need},
    workspace,
};

/// Arguments of `test`.
#[derive(clap::Args)]
pub(crate) struct Test {
    /// Run only this level; default: all levels that this machine supports.
    #[arg(value_enum)]
    level: Option<Level>,
    /// Run all checks on this kernel in level `kernel`; default: all checks on the oldest kernel, and on the others
    /// only those that depend on the kernel's version.
    #[arg(long, value_enum)]
    kernel: Option<Series>,
}

/// A level of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Level {
    /// Unit tests and property tests of plan, diff and election.
    Unit,
    /// Tests of the eBPF programs in this kernel. Requires root.
    Bpf,
    /// Lab tests: pools as namespaces, a real API server, the real binaries. Requires root.
    Lab,
    /// The tests of the controller with the oldest API server that Raven supports. Requires root.
    Oldest,
    /// L3 tests on other kernels in QEMU.
    Kernel,
    /// The images and manifests, installed on real kubelets. Only if it is named. Requires root.
    Installed,
}

impl Level {
    const ALL: [Self; 6] = [Self::Unit, Self::Bpf, Self::Lab, Self::Oldest, Self::Kernel, Self::Installed];

    fn needs(self) -> &'static [Need] {
        match self {
            Self::Unit | Self::Bpf => &[Need::Build, Need::Ebpf],
            Self::Oldest => &[Need::Build, Need::Ebpf, Need::Lab, Need::Kubernetes],
            // Level `kernel` checks its needs itself and is skipped if they cannot be installed.
            Self::Kernel => &[],
            Self::Lab => {
                &[Need::Build, Need::Ebpf, Need::Lab, Need::Kubernetes, Need::Kubelet, Need::Metrics, Need::WireguardGo]
            }
            Self::Installed => &[
                Need::Build,
                Need::Ebpf,
                Need::Image,
                Need::Lab,
                Need::Kubernetes,
                Need::Kubelet,
                Need::Workloads,
                Need::Helm,
            ],
        }
    }

    /// Returns the arguments of `cargo test` after [`PACKAGES`].
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Unit => &["--lib", "--bins"],
            Self::Bpf => &["--test", "programs"],
            // One test at a time, because others would affect its timing.
            Self::Lab => &[
                "--no-fail-fast",
                "--test",
                "lab",
                "--test",
                "engine",
                "--test",
                "control",
                "--test",
                "l3",
                "--test",
                "l7",
                "--",
                "--test-threads=1",
            ],
            Self::Oldest => &["--test", "control", "--", "--test-threads=1"],
            Self::Kernel => &[],
            Self::Installed => &["--test", "installed", "--", "--nocapture"],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Bpf => "bpf",
            Self::Lab => "lab",
            Self::Oldest => "oldest",
            Self::Kernel => "kernel",
            Self::Installed => "installed",
        }
    }

    /// Returns the reason why this machine cannot run the level.
    fn obstacle(self) -> Option<String> {
        let root = nix::unistd::geteuid().is_root();
        match self {
            Self::Unit => None,
            Self::Bpf | Self::Lab | Self::Oldest | Self::Installed if !root => {
                Some("it needs root (namespaces and BPF)".to_owned())
            }
            Self::Bpf | Self::Lab | Self::Oldest | Self::Kernel | Self::Installed => None,
        }
    }
}

/// The packages of all levels. They are the same, so that their dependencies have the same features and are compiled
/// once. The code of raven-ebpf is tested in the kernel, and its parsing in raven-common; `cargo xtask fuzz` runs the
/// fuzz targets.
const PACKAGES: [&str; 5] = ["--workspace", "--exclude", "raven-ebpf", "--exclude", "raven-fuzz"];

/// What is tested without `--kernel`. The L3 tests of level `lab` cover the other checks on this machine's kernel.
const KERNELS: [(Series, Scope); 4] = [
    (Series::V5_10, Scope::Whole),
    (Series::V6_1, Scope::Short),
    (Series::V6_12, Scope::Short),
    (Series::Newest, Scope::Short),
];

/// Result of a level.
enum Outcome {
    Passed,
    Failed,
    Skipped(String),
    /// Results of the single kernels.
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
    /// Runs the levels. Fails if a level failed, or if a level named on the command line was skipped.
    pub(crate) fn run(self) -> Result<()> {
        if self.kernel.is_some() && self.level != Some(Level::Kernel) {
            bail!("--kernel requires level `kernel`");
        }
        let levels = self.level.map_or(Level::ALL.to_vec(), |level| vec![level]);
        let mut outcomes = Vec::new();
        for level in levels {
            let optional = || {
                let unnamed = self.level.is_none() && level == Level::Installed;
                unnamed.then(|| "it compiles for ten minutes; run `cargo xtask test installed`".to_owned())
            };
            let outcome = match level.obstacle().or_else(optional) {
                Some(why) => Outcome::Skipped(why),
                None if level == Level::Kernel => Outcome::Kernels(kernel::run(
                    &self.kernel.map_or(KERNELS.to_vec(), |one| vec![(one, Scope::Whole)]),
                )?),
                None => run(level)?,
            };
            outcomes.push((level, outcome));
        }
        report(&outcomes);
        let failed = outcomes.iter().any(|(_, o)| o.failed());
        let refused = self.level.is_some() && outcomes.iter().any(|(_, o)| o.skipped());
        if failed || refused {
            bail!("not all requested tests passed");
        }
        Ok(())
    }
}

fn run(level: Level) -> Result<Outcome> {
    if level == Level::Installed {
        image::of_this_version()?;
    }
    let builds = if level == Level::Lab { vec![build::binaries_task()] } else { Vec::new() };
    setup::ensure_and_build(level.needs(), builds)?;
    if level == Level::Lab {
        build::tracing_object()?;
        setup::build_optional();
    }
    println!("\n=== {} ===", level.name());
    let mut test = raven_tests::cargo::command();
    test.current_dir(workspace()).arg("test").args(PACKAGES).args(level.arguments());
    test.env("RAVEN_IMAGES", image::folder());
    if level == Level::Oldest {
        match OLDEST.find_or_build_with(&|text| println!("  {text}")) {
            Ok(found) => test.env(API_SERVER, found.program("kube-apiserver")),
            Err(error) => return Ok(Outcome::Skipped(format!("{} cannot be built: {error:#}", OLDEST.names))),
        };
    }
    let status = test.status().context("start cargo test")?;
    Ok(if status.success() { Outcome::Passed } else { Outcome::Failed })
}

fn report(outcomes: &[(Level, Outcome)]) {
    println!("\n=== what was tested ===");
    println!("kernel: {} (this machine's)", kernel());
    println!("API server: {}", api_server());
    for module in setup::OPTIONAL {
        let found = module.find().ok().flatten();
        let found = found.map_or("none; its tests were SKIPPED".to_owned(), |found| found.dir.display().to_string());
        println!("{}: {found}", module.names);
    }
    for (level, outcome) in outcomes {
        match outcome {
            Outcome::Passed => println!("{:<9} passed", level.name()),
            Outcome::Failed => println!("{:<9} FAILED", level.name()),
            Outcome::Skipped(why) => println!("{:<9} SKIPPED: {why}", level.name()),
            Outcome::Kernels(each) => each.iter().for_each(|(series, o)| println!("{:<9} {series}: {o}", level.name())),
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
