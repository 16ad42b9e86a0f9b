//! `cargo xtask test kernel`: runs the L3 tests (`tests/vm`) on Debian's kernels in QEMU.

use std::{env, fmt, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, bail};
use raven_tests::qemu::{Image, Kernel, Machine};

use crate::{
    build,
    debian_kernel::{Series, find_or_fetch, output_of},
    setup, workspace,
};

/// Time limit per kernel: more than twice the longest run under emulation here, for machines that are half as fast.
const DEADLINE: Duration = Duration::from_secs(1320);

/// Which checks to run on a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All checks.
    Whole,
    /// The checks that depend on the kernel's version; the others are reported as skipped.
    Short,
}

/// Result of the tests on one kernel.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Ran { release: String, counts: Counts, seconds: u64, accelerator: &'static str },
    Failed(String),
    Skipped(String),
}

impl Outcome {
    pub(crate) fn passed(&self) -> bool {
        matches!(self, Self::Ran { counts: Counts { failed: 0, passed: 1.., .. }, .. })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ran { release, counts, seconds, accelerator } => {
                write!(f, "{release}: {counts} ({seconds} s, {accelerator})")
            }
            Self::Failed(why) => write!(f, "FAILED: {why}"),
            Self::Skipped(why) => write!(f, "SKIPPED: {why}"),
        }
    }
}

/// Runs the tests on the given kernels, one after the other: an emulated processor that shares one of this machine's
/// with another machine loses packets.
pub(crate) fn run(wanted: &[(Series, Scope)]) -> Result<Vec<(Series, Outcome)>> {
    let obstacle = obstacle();
    if obstacle.is_none() {
        build::binaries()?;
        build::vm_tests()?;
    }
    let mut outcomes = Vec::new();
    for (series, scope) in wanted {
        println!("\n=== kernel {series} ===");
        let outcome = match &obstacle {
            Some(why) => Outcome::Skipped(why.clone()),
            None => match find_or_fetch(*series) {
                Ok(kernel) => {
                    boot(*series, *scope, &kernel).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")))
                }
                Err(error) => Outcome::Skipped(format!("{error:#}")),
            },
        };
        println!("{series}: {outcome}");
        outcomes.push((*series, outcome));
    }
    Ok(outcomes)
}

/// Returns the reason why no kernel can be tested on this machine.
fn obstacle() -> Option<String> {
    if env::consts::ARCH != "x86_64" {
        return Some(format!("the kernels are for x86-64, and this machine is {}", env::consts::ARCH));
    }
    let needs = [setup::Need::Build, setup::Need::Ebpf, setup::Need::Lab, setup::Need::Vm];
    setup::ensure(&needs).err().map(|error| format!("{error:#}"))
}

/// Programs that the lab, its tests and the agent run.
const PROGRAMS: [&str; 43] = [
    "sh",
    "cat",
    "cp",
    "grep",
    "head",
    "ls",
    "mkdir",
    "rm",
    "rmdir",
    "sed",
    "setsid",
    "sleep",
    "sort",
    "tr",
    "true",
    "uname",
    "dmesg",
    "mount",
    "umount",
    "nsenter",
    "setpriv",
    "unshare",
    "modprobe",
    "sysctl",
    "ip",
    "tc",
    "bridge",
    "nft",
    "conntrack",
    "wg",
    "bpftool",
    "ethtool",
    "ping",
    "tcpdump",
    "find",
    "stat",
    "chmod",
    "ln",
    "mv",
    "touch",
    "wc",
    "tail",
    "awk",
];

fn boot(series: Series, scope: Scope, kernel: &Kernel) -> Result<Outcome> {
    println!("packing kernel {} with the lab's programs", kernel.release);
    let folder = workspace().join("target/vm").join(series.name());
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let initramfs = folder.join("initramfs");
    image(kernel, &folder)?.write(&initramfs)?;
    let console = folder.join("console.log");
    // Environment of the first process, inherited by all others. Six agents that start on one emulated processor took
    // 90 s until the last was ready (7.2), and waiting longer costs nothing where it is not needed.
    let mut words = vec!["RAVEN_TEST_PATIENCE=10".to_owned(), "NO_COLOR=1".to_owned()];
    words.extend((scope == Scope::Short).then(|| "RAVEN_TEST_SHORT=1".to_owned()));
    let machine = Machine { kernel: kernel.clone(), initramfs, words, deadline: DEADLINE, console };
    let mut summary = Summary::default();
    let ended = machine.run(|line| {
        println!("  {line}");
        summary.take(line);
    })?;
    println!("console: {}", machine.console.display());
    let Summary { release: Some(release), counts: Some(counts), complaint: None } = summary else {
        bail!(
            "{}",
            summary
                .complaint
                .unwrap_or_else(|| "the console contains no result, because the tests did not complete".to_owned())
        );
    };
    Ok(Outcome::Ran { release, counts, seconds: ended.elapsed.as_secs(), accelerator: ended.accelerator })
}

fn image(kernel: &Kernel, folder: &Path) -> Result<Image> {
    let mut image = Image::new();
    for name in PROGRAMS {
        let program = setup::on_path(name).with_context(|| format!("{name} is not installed"))?;
        image.program(Path::new("usr/bin").join(name), &program)?;
    }
    // The kernel runs modprobe by this path to load a module.
    let modprobe = setup::on_path("modprobe").context("modprobe (kmod) is not installed")?;
    image.program("usr/sbin/modprobe", &modprobe)?;
    let beside = env::current_exe()?.parent().context("xtask has no parent folder")?.to_owned();
    for (path, name) in [("init", "raven-vm-tests"), ("raven/raven-agent", "raven-agent")] {
        // Without debug information, of which the machine would keep two copies in memory.
        let stripped = folder.join(name);
        output_of(Command::new("strip").arg("-o").arg(&stripped).arg(beside.join(name)))?;
        image.program(path, &stripped)?;
    }
    image.modules(kernel, &folder.join("modules"))?;
    Ok(image)
}

/// Results read from the console.
#[derive(Debug, Default, PartialEq, Eq)]
struct Summary {
    release: Option<String>,
    counts: Option<Counts>,
    complaint: Option<String>,
}

impl Summary {
    fn take(&mut self, line: &str) {
        if let Some(release) = line.strip_prefix("kernel: ") {
            self.release = Some(release.to_owned());
        }
        self.counts = counts(line).or(self.counts);
        if line.contains("Kernel panic") || line.contains("Oops:") || line.contains("BUG:") {
            self.complaint.get_or_insert_with(|| line.to_owned());
        }
    }
}

/// Numbers of checks, from the line `N passed, M failed, K skipped`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

fn counts(line: &str) -> Option<Counts> {
    let mut parts = line.split(", ");
    let mut number = |word: &str| parts.next()?.strip_suffix(word)?.parse().ok();
    Some(Counts { passed: number(" passed")?, failed: number(" failed")?, skipped: number(" skipped")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_line_is_a_result_and_a_panic_is_a_failure() {
        let mut summary = Summary::default();
        for line in
            ["kernel: 5.10.0-46-cloud-amd64", "ok x: 3 passed, 0 failed, 0 skipped", "12 passed, 1 failed, 4 skipped"]
        {
            summary.take(line);
        }
        let counts = Counts { passed: 12, failed: 1, skipped: 4 };
        assert_eq!((summary.release.as_deref(), summary.counts), (Some("5.10.0-46-cloud-amd64"), Some(counts)));
        summary.take("[   12.1] Kernel panic - not syncing: Fatal exception");
        assert!(summary.complaint.is_some());
    }
}
