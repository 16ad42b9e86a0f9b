//! Finds or builds the Kubernetes programs of the lab.
//!
//! etcd, kube-apiserver and kubectl come from `KUBEBUILDER_ASSETS` (the envtest convention), else from the cache, else
//! they are built from Go modules (tests/kubernetes/go.mod). All other programs come from the cache or are built
//! (tests/kubernetes/{node,workloads,oldest,helm,metrics,wireguard,flannel,kube-router}/go.mod). Official release archives are not used,
//! because the development environment reaches package registries only, so a download could not be tested.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

/// Receives a description of a build's progress, such as "120 of 1500 packages".
pub type Report<'a> = &'a (dyn Fn(&str) + Sync);

/// Environment variable: path of a kube-apiserver that takes the place of the one that was found.
pub const API_SERVER: &str = "RAVEN_API_SERVER";

/// The programs of the control plane.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// Path of etcd. (Go names the program that it builds `server`.)
    pub etcd: PathBuf,
    /// Path of kube-apiserver.
    pub api_server: PathBuf,
    /// Path of kubectl.
    pub kubectl: PathBuf,
    /// Description of where the programs come from.
    pub origin: String,
}

impl Binaries {
    /// Names of the programs.
    pub const NAMES: &str = CONTROL_PLANE.names;

    /// Returns the programs if they exist.
    pub fn find() -> Result<Option<Self>> {
        if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS") {
            let found = Self::inside(Path::new(&assets), "etcd", "KUBEBUILDER_ASSETS");
            ensure!(found.is_some(), "KUBEBUILDER_ASSETS={} lacks etcd, kube-apiserver or kubectl", assets.display());
            return Ok(found);
        }
        Ok(Self::inside(&CONTROL_PLANE.cache_dir()?, "server", "the cache"))
    }

    /// Returns the programs; builds them into the cache if necessary, which takes minutes.
    pub fn find_or_build() -> Result<Self> {
        Self::find_or_build_with(&print)
    }

    /// Like [`Binaries::find_or_build`], with progress reports.
    pub fn find_or_build_with(report: Report<'_>) -> Result<Self> {
        match Self::find()? {
            Some(found) => Ok(found),
            None => {
                let dir = CONTROL_PLANE.find_or_build_with(report)?.dir;
                Self::inside(&dir, "server", "Go modules, built just now")
                    .context("the build did not produce all programs")
            }
        }
    }

    fn inside(dir: &Path, etcd: &str, origin: &str) -> Option<Self> {
        let own = std::env::var_os(API_SERVER).map(PathBuf::from);
        let binaries = Self {
            etcd: dir.join(etcd),
            origin: format!("{origin} ({})", own.as_deref().unwrap_or(dir).display()),
            api_server: own.unwrap_or_else(|| dir.join("kube-apiserver")),
            kubectl: dir.join("kubectl"),
        };
        let all = [&binaries.etcd, &binaries.api_server, &binaries.kubectl];
        all.iter().all(|path| path.is_file()).then_some(binaries)
    }
}

/// Programs built from a Go module.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Folder that contains all of them; containerd looks for its shim in its own folder.
    pub dir: PathBuf,
}

impl Programs {
    /// Returns the path of a program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

fn print(progress: &str) {
    eprintln!("  {progress}");
}

/// A Go module that lists commands as tools.
#[derive(Debug)]
pub struct Module {
    folder: &'static str,
    /// Module whose version is part of the cache folder's name.
    versioned: &'static str,
    /// Suffix of the cache folder's name.
    suffix: &'static str,
    /// Names of the programs, for messages.
    pub names: &'static str,
    /// File names of the programs.
    programs: &'static [&'static str],
    /// The programs contain C.
    cgo: bool,
}

const CONTROL_PLANE: Module = Module {
    folder: "kubernetes",
    versioned: KUBERNETES,
    suffix: "",
    names: "etcd, kube-apiserver and kubectl",
    programs: &["server", "kube-apiserver", "kubectl"],
    cgo: false,
};
/// The API server of the oldest Kubernetes that Raven supports.
pub const OLDEST: Module = Module {
    folder: "kubernetes/oldest",
    versioned: KUBERNETES,
    suffix: "-oldest",
    names: "the oldest supported kube-apiserver",
    programs: &["kube-apiserver"],
    cgo: false,
};
/// The programs of a node with a kubelet.
pub const NODE: Module = Module {
    folder: "kubernetes/node",
    versioned: KUBERNETES,
    suffix: "-node",
    names: "kubelet, containerd, kube-proxy and CoreDNS",
    programs: &["kubelet", "containerd", "containerd-shim-runc-v2", "ctr", "kube-proxy", "coredns"],
    cgo: false,
};
/// The programs that run DaemonSets and Deployments.
pub const WORKLOADS: Module = Module {
    folder: "kubernetes/workloads",
    versioned: KUBERNETES,
    suffix: "-workloads",
    names: "kube-controller-manager and kube-scheduler",
    programs: &["kube-controller-manager", "kube-scheduler"],
    cgo: false,
};
/// helm, with which the chart is tested.
pub const HELM: Module = Module {
    folder: "kubernetes/helm",
    versioned: "helm.sh/helm/v4",
    suffix: "-helm",
    names: "helm",
    programs: &["helm"],
    cgo: false,
};
/// metrics-server, which only tests use.
pub const METRICS: Module = Module {
    folder: "kubernetes/metrics",
    versioned: "sigs.k8s.io/metrics-server",
    suffix: "-metrics-server",
    names: "metrics-server",
    programs: &["metrics-server"],
    cgo: false,
};
/// wireguard-go, against which Raven's engine is measured and tested.
pub const WIREGUARD: Module = Module {
    folder: "kubernetes/wireguard",
    versioned: "golang.zx2c4.com/wireguard",
    suffix: "-wireguard",
    names: "wireguard-go",
    programs: &["wireguard"],
    cgo: false,
};
/// flannel, which only tests use.
pub const FLANNEL: Module = Module {
    folder: "kubernetes/flannel",
    versioned: "github.com/flannel-io/flannel",
    suffix: "-flannel",
    names: "flannel",
    programs: &["flannel"],
    cgo: true,
};
/// kube-router, which only tests use.
pub const KUBE_ROUTER: Module = Module {
    folder: "kubernetes/kube-router",
    versioned: "github.com/cloudnativelabs/kube-router/v2",
    suffix: "-kube-router",
    names: "kube-router",
    programs: &["kube-router"],
    cgo: false,
};
const KUBERNETES: &str = "k8s.io/kubernetes";

impl Module {
    /// Returns the programs if they exist.
    pub fn find(&self) -> Result<Option<Programs>> {
        let dir = self.cache_dir()?;
        Ok(self.programs.iter().all(|name| dir.join(name).is_file()).then_some(Programs { dir }))
    }

    /// Returns the programs; builds them into the cache if necessary, which takes minutes.
    pub async fn find_or_build(&'static self) -> Result<Programs> {
        tokio::task::spawn_blocking(|| self.find_or_build_with(&print)).await?
    }

    /// Like [`Module::find_or_build`], for callers that may block, with progress reports.
    pub fn find_or_build_with(&self, report: Report<'_>) -> Result<Programs> {
        if let Some(found) = self.find()? {
            return Ok(found);
        }
        self.build(report)?;
        self.find()?.with_context(|| format!("the build did not produce all of {}", self.names))
    }

    fn folder(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(self.folder)
    }

    /// Returns `~/.cache/raven/kubernetes/<version>-<hash of go.sum>/`.
    fn cache_dir(&self) -> Result<PathBuf> {
        let sums =
            fs::read(self.folder().join("go.sum")).with_context(|| format!("read tests/{}/go.sum", self.folder))?;
        let hash: String = Sha256::digest(sums).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let home = std::env::var_os("HOME").context("HOME is not set")?;
        Ok(Path::new(&home).join(".cache/raven/kubernetes").join(format!("{}{}-{hash}", self.version()?, self.suffix)))
    }

    /// Returns the version required by go.mod, such as `v1.37.2`.
    fn version(&self) -> Result<String> {
        let module = fs::read_to_string(self.folder().join("go.mod"))
            .with_context(|| format!("read tests/{}/go.mod", self.folder))?;
        let line = module.lines().find_map(|line| line.trim().strip_prefix(self.versioned)?.strip_prefix(" v"));
        let version = line.and_then(|rest| rest.split_whitespace().next());
        let version =
            version.with_context(|| format!("tests/{}/go.mod requires no {}", self.folder, self.versioned))?;
        Ok(format!("v{version}"))
    }

    /// Builds the programs into the cache, unless another process has done so meanwhile.
    fn build(&self, report: Report<'_>) -> Result<()> {
        let dir = self.cache_dir()?;
        let parent = dir.parent().context("the cache has no parent folder")?;
        fs::create_dir_all(parent)?;
        // Labs that start concurrently build each module once; different modules are built in parallel.
        let lock = File::create(parent.join(format!(".lock{}", self.suffix)))?;
        lock.lock().context("lock the cache")?;
        if self.find()?.is_some() {
            return Ok(());
        }
        report(&format!("building {} from Go modules into {} (5 to 10 minutes, once)", self.names, dir.display()));
        let unfinished = tempdir_beside(&dir)?;
        self.go_build(&unfinished, report)?;
        fs::rename(&unfinished, &dir).with_context(|| format!("rename the build's folder to {}", dir.display()))
    }

    fn go_build(&self, into: &Path, report: Report<'_>) -> Result<()> {
        let version = self.version()?;
        let mut parts = version.trim_start_matches('v').split('.');
        let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        // kubectl rejects servers without a version.
        let base = "-X k8s.io/component-base/version";
        let flags = format!("-s -w {base}.gitVersion={version} {base}.gitMajor={major} {base}.gitMinor={minor}");
        let total = self.packages()?;
        let mut go = self
            .go()
            .args(["build", "-v", "-trimpath", "-ldflags", &flags, "-o"])
            .arg(format!("{}/", into.display()))
            .arg("tool")
            .stderr(Stdio::piped())
            .spawn()
            .context("start go (requires Go 1.26 or newer; or set KUBEBUILDER_ASSETS)")?;
        let output =
            show_progress(BufReader::new(go.stderr.take().context("go has no standard error")?), total, report)?;
        let status = go.wait()?;
        if !status.success() {
            bail!("go build: {status}; the end of its output:\n{}", output.join("\n"));
        }
        Ok(())
    }

    /// Returns the number of packages to compile. Downloads the modules, as the build would.
    fn packages(&self) -> Result<usize> {
        let listed = self.go().args(["list", "-deps", "tool"]).output();
        let listed = listed.context("start go (requires Go 1.26 or newer; or set KUBEBUILDER_ASSETS)")?;
        let errors = String::from_utf8_lossy(&listed.stderr);
        ensure!(
            listed.status.success(),
            "go list: {} (requires Go 1.26 or newer; or set KUBEBUILDER_ASSETS); the end of its output:\n{}",
            listed.status,
            errors.trim()
        );
        Ok(listed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count())
    }

    fn go(&self) -> Command {
        // With low priority, because a lab may run beside the build.
        let mut go = Command::new("nice");
        go.args(["-n", "10", "go"]);
        go.current_dir(self.folder()).env("CGO_ENABLED", if self.cgo { "1" } else { "0" }).stdin(Stdio::null());
        go
    }
}

fn tempdir_beside(dir: &Path) -> Result<PathBuf> {
    let mut name = dir.file_name().context("the cache folder has no name")?.to_owned();
    name.push(".unfinished");
    let path = dir.with_file_name(name);
    if path.exists() {
        fs::remove_dir_all(&path)?;
    }
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// Counts the packages that `go build -v` prints and reports every 50. Packages in Go's build cache are not printed.
/// Returns the last 30 lines for an error message.
fn show_progress(lines: impl BufRead, total: usize, report: Report<'_>) -> Result<Vec<String>> {
    let mut last = Vec::new();
    for (count, line) in lines.lines().enumerate() {
        last.push(line?);
        if count % 50 == 49 {
            report(&format!("{} of {total} packages", count + 1));
        }
        if last.len() > 30 {
            last.remove(0);
        }
    }
    Ok(last)
}
