//! `cargo xtask setup`: finds or installs what builds and tests need.
//!
//! It checks the things themselves each time (a file, a program on PATH) and keeps no record, so nothing can become
//! stale. If everything is installed, that takes milliseconds. Other commands call [`ensure()`] with their needs.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use raven_tests::kubernetes::binaries::{
    Binaries, FLANNEL, HELM, KUBE_ROUTER, METRICS, Module, NODE, OLDEST, WIREGUARD, WORKLOADS,
};

use crate::debian_kernel::{self, Series};
use crate::progress::{self, Task};
use crate::toolchain::{self, Toolchain};

/// Version of LLVM to build bpf-linker with: that of Debian's rustc-web, whose bitcode it must read.
const LLVM: &str = "22";

/// Arguments of `setup`.
#[derive(clap::Args)]
pub(crate) struct Setup {
    /// Install nothing; fail with a list of what is missing.
    #[arg(long)]
    check: bool,
}

impl Setup {
    /// Installs everything that the commands of the README need.
    pub(crate) fn run(self) -> Result<()> {
        let all = [
            Need::Build,
            Need::Ebpf,
            Need::Lab,
            Need::Kubernetes,
            Need::Kubelet,
            Need::Metrics,
            Need::WireguardGo,
            Need::Vm,
            Need::Image,
        ];
        if self.check {
            let missing: Vec<String> = all.iter().flat_map(|need| need.missing()).collect();
            ensure!(missing.is_empty(), "missing: {}", missing.join(", "));
        } else {
            ensure(&all)?;
            build_optional();
            fetch_kernels();
        }
        println!("eBPF toolchain: {}", toolchain::find().map_or("none".to_owned(), |found| found.to_string()));
        println!("bpf-linker: {}", linker().map_or("none".to_owned(), |path| path.display().to_string()));
        println!("Kubernetes: {}", Binaries::find()?.map_or("none".to_owned(), |found| found.origin));
        println!("nothing is missing");
        Ok(())
    }
}

/// Programs without which only their own tests are skipped.
pub(crate) const OPTIONAL: [&Module; 3] = [&OLDEST, &FLANNEL, &KUBE_ROUTER];

/// Builds the oldest API server and other people's CNIs. What cannot be built is reported here, and its tests are skipped.
pub(crate) fn build_optional() {
    for module in OPTIONAL {
        match module.find_or_build_with(&|text| println!("  {}: {text}", module.names)) {
            Ok(found) => println!("{}: {}", module.names, found.dir.display()),
            Err(error) => println!("{}: none ({error:#})", module.names),
        }
    }
}

/// Downloads the kernels for tests. An unavailable kernel is reported here, and its tests are skipped.
fn fetch_kernels() {
    for series in Series::ALL {
        match debian_kernel::find_or_fetch(series) {
            Ok(found) => println!("kernel {series}: {}", found.release),
            Err(error) => println!("kernel {series}: none ({error:#})"),
        }
    }
}

/// A requirement of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Programs for the host's build besides cargo.
    Build,
    /// A compiler for `bpfel-unknown-none` and bpf-linker.
    Ebpf,
    /// System programs of the lab.
    Lab,
    /// etcd, kube-apiserver, kubectl.
    Kubernetes,
    /// kubelet, containerd, kube-proxy, CoreDNS, and the programs they run.
    Kubelet,
    /// kube-controller-manager and kube-scheduler, which run DaemonSets and Deployments, and the CNI's plugins.
    Workloads,
    /// helm, with which the chart is tested.
    Helm,
    /// metrics-server, which only tests use.
    Metrics,
    /// wireguard-go, which only tests and benchmarks of the engine use.
    WireguardGo,
    /// Programs that boot other kernels. The kernels themselves are downloaded when they are tested.
    Vm,
    /// Programs that images contain, and that read their libraries, packages and commit.
    Image,
}

/// Installs what is missing. Returns immediately if nothing is.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    ensure_and_build(needs, Vec::new())
}

/// Like [`ensure()`]. Runs `builds`, which need the eBPF toolchain, in parallel with the builds of Kubernetes.
pub(crate) fn ensure_and_build(needs: &[Need], builds: Vec<Task>) -> Result<()> {
    ensure_packages(needs)?;
    let mut cargo = Vec::new();
    if needs.contains(&Need::Ebpf) && linker().is_none() {
        cargo.push(Task::new("building bpf-linker (1 to 3 minutes, once)", |_| install_linker()));
    }
    cargo.extend(builds);
    let mut lanes: Vec<Vec<Task>> = [cargo].into_iter().filter(|lane| !lane.is_empty()).collect();
    lanes.extend(needs.iter().filter_map(|need| need.go_build()).map(|task| vec![task]));
    progress::parallel(lanes)
}

/// Installs the system packages of these needs, and nothing else.
pub(crate) fn ensure_packages(needs: &[Need]) -> Result<()> {
    let packages: Vec<Tool> = needs.iter().flat_map(|need| need.tools()).filter(|tool| !tool.present()).collect();
    let toolchain = needs.contains(&Need::Ebpf) && toolchain::find().is_err();
    let bpf_linker = needs.contains(&Need::Ebpf) && linker().is_none();
    install_packages(&packages, toolchain, bpf_linker)
}

impl Need {
    /// Returns the task that builds the Go programs of this need, or `None` if it has none or they exist.
    fn go_build(self) -> Option<Task> {
        let name = |names: &str| format!("building {names} from Go modules (5 to 10 minutes, once)");
        if self == Self::Kubernetes && !matches!(Binaries::find(), Ok(Some(_))) {
            return Some(Task::new(name(Binaries::NAMES), |reporter| {
                Binaries::find_or_build_with(&|text| reporter.detail(text)).map(drop)
            }));
        }
        let module = self.missing_module()?;
        Some(Task::new(name(module.names), move |reporter| {
            module.find_or_build_with(&|text| reporter.detail(text)).map(drop)
        }))
    }

    /// Returns the Go module of this need, if its programs are missing. Those of the control plane may also come from
    /// KUBEBUILDER_ASSETS, so they are not among them.
    fn missing_module(self) -> Option<&'static Module> {
        let module = match self {
            Self::Kubelet => &NODE,
            Self::Workloads => &WORKLOADS,
            Self::Helm => &HELM,
            Self::Metrics => &METRICS,
            Self::WireguardGo => &WIREGUARD,
            _ => return None,
        };
        (!matches!(module.find(), Ok(Some(_)))).then_some(module)
    }

    /// Returns the system programs of this need.
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
            Self::Kubernetes | Self::Helm | Self::Metrics | Self::WireguardGo => Vec::new(),
            // The plugins are not on the path.
            Self::Workloads => vec![Tool { program: "/usr/lib/cni/bridge", package: "containernetworking-plugins" }],
            Self::Kubelet => vec![tool("runc", "runc"), tool("busybox", "busybox-static"), tool("curl", "curl")],
            Self::Vm => vec![
                tool("qemu-system-x86_64", "qemu-system-x86"),
                tool("depmod", "kmod"),
                tool("strip", "binutils"),
                tool("ldd", "libc-bin"),
                tool("find", "findutils"),
                tool("unshare", "util-linux"),
            ],
            Self::Image => {
                vec![tool("nft", "nftables"), tool("ldd", "libc-bin"), tool("dpkg-query", "dpkg"), tool("git", "git")]
            }
        }
    }

    /// Returns descriptions of what is missing.
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
        if let Some(module) = self.missing_module() {
            missing.push(format!("{} (Go to build them)", module.names));
        }
        missing
    }
}

/// A program and the Debian package that contains it.
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

/// Finds a program on PATH or in the folders of root's programs, which a user's PATH may lack.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(extra).map(|dir| dir.join(program)).find(|path| path.is_file())
}

// === The eBPF toolchain ===

const TOOLCHAINS: &str = "Debian's rustc-web + libstd-rust-web-dev-bpf, or rustup's nightly with rust-src";

/// Returns the path of bpf-linker: the one that `setup` built, or one on PATH.
pub(crate) fn linker() -> Option<PathBuf> {
    let own = toolchain::tools_dir().join("bpf-linker");
    if own.is_file() { Some(own) } else { on_path("bpf-linker") }
}

fn llvm_bin() -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{LLVM}/bin"))
}

fn install_linker() -> Result<()> {
    let bin = toolchain::tools_dir();
    let root = bin.parent().context("the folder for tools has no parent folder")?;
    let mut command = Command::new("cargo");
    command.args(["install", "bpf-linker", "--locked", "--root"]).arg(root);
    if llvm_bin().join("llvm-config").is_file() {
        // This llvm-config must be found first, or linking with -lLLVM fails.
        command.args(["--no-default-features", "--features", &format!("llvm-{LLVM}")]);
        command.env("PATH", path_with(&llvm_bin())?);
    }
    progress::logged(&mut command)?;
    ensure!(linker().is_some(), "cargo install did not create bpf-linker in {}", root.display());
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
        bail!("missing programs, and this system has no apt-get to install them: {}{compiler}", programs.join(", "));
    };
    if !is_root()? {
        bail!(
            "missing packages, which only root can install: apt-get install --no-install-recommends {}",
            packages.join(" ")
        );
    }
    progress::run("updating apt's package lists", Command::new(&apt).args(["update", "-qq"]))?;
    let mut install = Command::new(&apt);
    // wireguard-tools recommends a kernel.
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&packages);
    progress::run(&format!("installing {}", packages.join(" ")), install.env("DEBIAN_FRONTEND", "noninteractive"))
}

fn is_root() -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata("/proc/self").context("read the owner of /proc/self")?.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_existing_programs_are_found_on_path() {
        assert!(on_path("sh").is_some());
        assert!(on_path("raven-no-such-program").is_none());
    }
}
