//! `cargo xtask setup`: finds or installs what build and tests need, and says what it does.
//!
//! Looks at the things themselves each time (a file, a program on PATH) and keeps no record of its own: nothing can go stale, and
//! with all there it takes milliseconds. Other commands call [`ensure`] with what they need.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use raven_tests::kubernetes::binaries::{Binaries, NodeBinaries};

use crate::kernel::{self, Series};
use crate::toolchain::{self, Toolchain};

/// LLVM that bpf-linker is built with: that of Debian's rustc-web, whose bitcode it must read.
const LLVM: &str = "22";

/// Arguments of `setup`.
#[derive(clap::Args)]
pub(crate) struct Setup {
    /// Only say what is missing; install nothing.
    #[arg(long)]
    check: bool,
}

impl Setup {
    /// Sets everything up.
    pub(crate) fn run(self) -> Result<()> {
        let all = [Need::Build, Need::Ebpf, Need::Lab, Need::Kubernetes, Need::Kubelet, Need::Vm];
        if self.check {
            let missing: Vec<String> = all.iter().flat_map(|need| need.missing()).collect();
            ensure!(missing.is_empty(), "missing: {}", missing.join(", "));
        } else {
            ensure(&all)?;
            fetch_kernels();
        }
        println!("eBPF toolchain: {}", toolchain::find().map_or("none".to_owned(), |found| found.to_string()));
        println!("bpf-linker: {}", linker().map_or("none".to_owned(), |path| path.display().to_string()));
        println!("Kubernetes: {}", Binaries::find()?.map_or("none".to_owned(), |found| found.origin));
        println!("nothing is missing");
        Ok(())
    }
}

/// The kernels that tests boot. One that is not to be had is named here, and skipped there.
fn fetch_kernels() {
    for series in Series::ALL {
        match kernel::find_or_fetch(series) {
            Ok(found) => println!("kernel {series}: {}", found.release),
            Err(error) => println!("kernel {series}: none ({error:#})"),
        }
    }
}

/// Something that a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// What the ordinary build uses besides cargo.
    Build,
    /// A compiler for `bpfel-unknown-none` and bpf-linker.
    Ebpf,
    /// The system programs of the lab.
    Lab,
    /// etcd, kube-apiserver, kubectl.
    Kubernetes,
    /// kubelet, containerd, kube-proxy, CoreDNS, and what they run with.
    Kubelet,
    /// What boots other kernels; the kernels themselves are fetched when one is tested.
    Vm,
}

/// Installs what is missing of these; says what it does; gives back at once when nothing is.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let packages: Vec<Tool> = needs.iter().flat_map(|need| need.tools()).filter(|tool| !tool.present()).collect();
    let toolchain = needs.contains(&Need::Ebpf) && toolchain::find().is_err();
    let bpf_linker = needs.contains(&Need::Ebpf) && linker().is_none();
    install_packages(&packages, toolchain, bpf_linker)?;
    if bpf_linker {
        install_linker()?;
    }
    if needs.contains(&Need::Kubernetes) {
        Binaries::find_or_build()?;
    }
    if needs.contains(&Need::Kubelet) {
        NodeBinaries::find_or_build()?;
    }
    Ok(())
}

impl Need {
    /// The system programs that it takes.
    fn tools(self) -> Vec<Tool> {
        let tool = |program, package| Tool { program, package };
        match self {
            Self::Build => vec![tool("cc", "gcc")],
            Self::Ebpf => Vec::new(),
            Self::Lab => vec![
                tool("ip", "iproute2"),
                tool("nft", "nftables"),
                tool("iptables", "iptables"),
                tool("ipset", "ipset"),
                tool("conntrack", "conntrack"),
                tool("wg", "wireguard-tools"),
                tool("bpftool", "bpftool"),
                tool("ethtool", "ethtool"),
                tool("ping", "iputils-ping"),
                tool("tcpdump", "tcpdump"),
                tool("iperf3", "iperf3"),
                tool("nsenter", "util-linux"),
                tool("sysctl", "procps"),
            ],
            Self::Kubernetes => Vec::new(),
            Self::Kubelet => vec![tool("runc", "runc"), tool("busybox", "busybox-static"), tool("curl", "curl")],
            Self::Vm => vec![
                tool("qemu-system-x86_64", "qemu-system-x86"),
                tool("depmod", "kmod"),
                tool("strip", "binutils"),
                tool("ldd", "libc-bin"),
                tool("find", "findutils"),
                tool("unshare", "util-linux"),
            ],
        }
    }

    /// What is missing, in words.
    fn missing(self) -> Vec<String> {
        let tools = self.tools().into_iter().filter(|tool| !tool.present());
        let mut missing: Vec<String> = tools.map(|tool| format!("{} ({})", tool.program, tool.package)).collect();
        if self == Self::Ebpf {
            let toolchain = toolchain::find().is_err().then(|| format!("a Rust toolchain for eBPF ({TOOLCHAINS})"));
            let linker = linker().is_none().then(|| "bpf-linker".to_owned());
            missing.extend(toolchain.into_iter().chain(linker));
        }
        if self == Self::Kubernetes && !matches!(Binaries::find(), Ok(Some(_))) {
            missing.push("etcd, kube-apiserver, kubectl (KUBEBUILDER_ASSETS, or Go to build them)".to_owned());
        }
        if self == Self::Kubelet && !matches!(NodeBinaries::find(), Ok(Some(_))) {
            missing.push("kubelet, containerd, kube-proxy, CoreDNS (Go to build them)".to_owned());
        }
        missing
    }
}

/// A program, and the Debian package that brings it.
#[derive(Clone, Copy)]
struct Tool {
    program: &'static str,
    package: &'static str,
}

impl Tool {
    fn present(self) -> bool {
        on_path(self.program).is_some()
    }
}

/// Finds a program on PATH, or where root's programs lie that a user's PATH may lack.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(extra).map(|dir| dir.join(program)).find(|path| path.is_file())
}

// === The eBPF toolchain ===

const TOOLCHAINS: &str = "Debian's rustc-web + libstd-rust-web-dev-bpf, or rustup's nightly with rust-src";

/// bpf-linker: ours, or one on PATH.
pub(crate) fn linker() -> Option<PathBuf> {
    let own = toolchain::tools_dir().join("bpf-linker");
    if own.is_file() { Some(own) } else { on_path("bpf-linker") }
}

fn llvm_bin() -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{LLVM}/bin"))
}

fn install_linker() -> Result<()> {
    let bin = toolchain::tools_dir();
    let root = bin.parent().context("the tools' folder has a parent")?;
    eprintln!("installing bpf-linker into {} (1 to 3 minutes, once)", root.display());
    let mut command = Command::new("cargo");
    command.args(["install", "bpf-linker", "--locked", "--root"]).arg(root);
    if llvm_bin().join("llvm-config").is_file() {
        // Its llvm-config must be found first, or the link fails on -lLLVM.
        command.args(["--no-default-features", "--features", &format!("llvm-{LLVM}")]);
        command.env("PATH", path_with(&llvm_bin())?);
    }
    run(&mut command)?;
    ensure!(linker().is_some(), "cargo install left no bpf-linker in {}", root.display());
    Ok(())
}

fn path_with(first: &Path) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    Ok(env::join_paths([first.to_owned()].into_iter().chain(env::split_paths(&path)))?)
}

// === System packages ===

fn install_packages(tools: &[Tool], toolchain: bool, bpf_linker: bool) -> Result<()> {
    let mut packages: Vec<String> = tools.iter().map(|tool| tool.package.to_owned()).collect();
    if toolchain {
        packages.extend(["rustc-web".to_owned(), "libstd-rust-web-dev-bpf".to_owned()]);
    }
    let prebuilt = toolchain || matches!(toolchain::find(), Ok(Toolchain::PrebuiltCore { .. }));
    if bpf_linker && prebuilt && !llvm_bin().join("llvm-config").is_file() {
        packages.push(format!("llvm-{LLVM}-dev"));
    }
    packages.sort();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let Some(apt) = on_path("apt-get") else {
        let programs: Vec<&str> = tools.iter().map(|tool| tool.program).collect();
        let compiler = if toolchain { format!("; for eBPF {TOOLCHAINS}") } else { String::new() };
        bail!("missing, and this system has no apt-get to install it with: {}{compiler}", programs.join(", "));
    };
    if !is_root()? {
        bail!("missing, and only root can install it: apt-get install --no-install-recommends {}", packages.join(" "));
    }
    eprintln!("installing {}", packages.join(" "));
    run(Command::new(&apt).args(["update", "-qq"]))?;
    let mut install = Command::new(&apt);
    // wireguard-tools recommends a kernel.
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&packages);
    run(install.env("DEBIAN_FRONTEND", "noninteractive"))
}

fn is_root() -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata("/proc/self").context("look at /proc/self")?.uid() == 0)
}

/// Runs a command whose output a person may watch; on standard error, as standard output may be somebody's JSON.
fn run(command: &mut Command) -> Result<()> {
    use std::io::stderr;
    use std::os::fd::AsFd;
    let output = stderr().as_fd().try_clone_to_owned()?;
    let status = command.stdout(output).status().with_context(|| format!("start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_on_the_path_and_a_made_up_one_is_not() {
        assert!(on_path("sh").is_some());
        assert!(on_path("raven-no-such-program").is_none());
    }
}
