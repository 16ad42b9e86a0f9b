//! Finds etcd, kube-apiserver and kubectl: `KUBEBUILDER_ASSETS` (the envtest convention), then the cache, else built
//! from Go modules (tests/kubernetes/go.mod); and what runs on nodes that have a kubelet, from the cache or built
//! (tests/kubernetes/{node,metrics}/go.mod). The official release archives are not tried: nothing but package
//! registries is reached from where this is developed, and a download that nobody could test is worse than none.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

/// The programs, and where they came from.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// etcd (Go calls the one that it builds `server`).
    pub etcd: PathBuf,
    /// kube-apiserver.
    pub api_server: PathBuf,
    /// kubectl.
    pub kubectl: PathBuf,
    /// In words.
    pub origin: String,
}

impl Binaries {
    /// Those that are there already.
    pub fn find() -> Result<Option<Self>> {
        if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS") {
            let found = Self::inside(Path::new(&assets), "etcd", "KUBEBUILDER_ASSETS");
            ensure!(found.is_some(), "KUBEBUILDER_ASSETS={} lacks etcd, kube-apiserver or kubectl", assets.display());
            return Ok(found);
        }
        Ok(Self::inside(&CONTROL_PLANE.cache_dir()?, "server", "the cache"))
    }

    /// Those that are there, else built into the cache (minutes; progress on standard error).
    pub fn find_or_build() -> Result<Self> {
        match Self::find()? {
            Some(found) => Ok(found),
            None => {
                let dir = CONTROL_PLANE.build(|| Ok(Self::find()?.is_some()))?;
                Self::inside(&dir, "server", "Go modules, built just now").context("the build left a program out")
            }
        }
    }

    fn inside(dir: &Path, etcd: &str, origin: &str) -> Option<Self> {
        let binaries = Self {
            etcd: dir.join(etcd),
            api_server: dir.join("kube-apiserver"),
            kubectl: dir.join("kubectl"),
            origin: format!("{origin} ({})", dir.display()),
        };
        let all = [&binaries.etcd, &binaries.api_server, &binaries.kubectl];
        all.iter().all(|path| path.is_file()).then_some(binaries)
    }
}

/// What runs on a node that has a kubelet, and metrics-server.
#[derive(Clone, Debug)]
pub struct NodeBinaries {
    /// The folder that holds all of them: containerd looks for its shim beside itself.
    pub dir: PathBuf,
    /// metrics-server, in a folder of its own.
    pub metrics_server: PathBuf,
}

impl NodeBinaries {
    /// Those that are there already.
    pub fn find() -> Result<Option<Self>> {
        let (dir, metrics_server) = (NODE.cache_dir()?, METRICS.cache_dir()?.join("metrics-server"));
        let there = node_programs(&dir) && metrics_server.is_file();
        Ok(there.then_some(Self { dir, metrics_server }))
    }

    /// Those that are there, else built into the cache (minutes; progress on standard error).
    pub fn find_or_build() -> Result<Self> {
        if let Some(found) = Self::find()? {
            return Ok(found);
        }
        NODE.build(|| Ok(node_programs(&NODE.cache_dir()?)))?;
        METRICS.build(|| Ok(METRICS.cache_dir()?.join("metrics-server").is_file()))?;
        Self::find()?.context("the build left a program out")
    }

    /// One of them.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

fn node_programs(dir: &Path) -> bool {
    let all = ["kubelet", "containerd", "containerd-shim-runc-v2", "ctr", "kube-proxy", "coredns"];
    all.iter().all(|name| dir.join(name).is_file())
}

/// A Go module that names commands.
struct Module {
    folder: &'static str,
    /// The module whose version is that of the cache's folder.
    versioned: &'static str,
    /// Of the cache's folder.
    suffix: &'static str,
    what: &'static str,
}

const CONTROL_PLANE: Module = Module { folder: "kubernetes", versioned: KUBERNETES, suffix: "", what: "etcd, kube-apiserver and kubectl" };
const NODE: Module =
    Module { folder: "kubernetes/node", versioned: KUBERNETES, suffix: "-node", what: "kubelet, containerd, kube-proxy and CoreDNS" };
const METRICS: Module =
    Module { folder: "kubernetes/metrics", versioned: "sigs.k8s.io/metrics-server", suffix: "-metrics-server", what: "metrics-server" };
const KUBERNETES: &str = "k8s.io/kubernetes";

impl Module {
    fn folder(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(self.folder)
    }

    /// `~/.cache/raven/kubernetes/<version>-<hash of go.sum>/`.
    fn cache_dir(&self) -> Result<PathBuf> {
        let sums = fs::read(self.folder().join("go.sum")).with_context(|| format!("read tests/{}/go.sum", self.folder))?;
        let hash: String = Sha256::digest(sums).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let home = std::env::var_os("HOME").context("HOME is not set")?;
        Ok(Path::new(&home).join(".cache/raven/kubernetes").join(format!("{}{}-{hash}", self.version()?, self.suffix)))
    }

    /// The version that go.mod asks for, `v1.37.2`.
    fn version(&self) -> Result<String> {
        let module = fs::read_to_string(self.folder().join("go.mod")).with_context(|| format!("read tests/{}/go.mod", self.folder))?;
        let line = module.lines().find_map(|line| line.trim().strip_prefix(self.versioned)?.strip_prefix(" v"));
        let version = line.and_then(|rest| rest.split_whitespace().next());
        let version = version.with_context(|| format!("tests/{}/go.mod requires no {}", self.folder, self.versioned))?;
        Ok(format!("v{version}"))
    }

    /// Builds all of them into the cache, unless somebody else did meanwhile; gives the folder.
    fn build(&self, there: impl Fn() -> Result<bool>) -> Result<PathBuf> {
        let dir = self.cache_dir()?;
        let parent = dir.parent().context("the cache has a parent")?;
        fs::create_dir_all(parent)?;
        // Two labs that start at once build once.
        let lock = File::create(parent.join(".lock"))?;
        lock.lock().context("lock the cache")?;
        if there()? {
            return Ok(dir);
        }
        eprintln!("building {} from Go modules into {} (5 to 10 minutes, once)", self.what, dir.display());
        let unfinished = tempdir_beside(&dir)?;
        self.go_build(&unfinished)?;
        fs::rename(&unfinished, &dir).with_context(|| format!("move what was built to {}", dir.display()))?;
        Ok(dir)
    }

    fn go_build(&self, into: &Path) -> Result<()> {
        let version = self.version()?;
        let mut parts = version.trim_start_matches('v').split('.');
        let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        // Without a version kubectl refuses to talk.
        let base = "-X k8s.io/component-base/version";
        let flags = format!("-s -w {base}.gitVersion={version} {base}.gitMajor={major} {base}.gitMinor={minor}");
        let mut go = Command::new("go")
            .args(["build", "-v", "-trimpath", "-ldflags", &flags, "-o"])
            .arg(format!("{}/", into.display()))
            .arg("tool")
            .current_dir(self.folder())
            .env("CGO_ENABLED", "0")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start go (is Go 1.26 or newer installed? or set KUBEBUILDER_ASSETS)")?;
        let said = show_progress(BufReader::new(go.stderr.take().context("standard error was asked for")?))?;
        let status = go.wait()?;
        if !status.success() {
            bail!("go build: {status}; it ended with:\n{}", said.join("\n"));
        }
        Ok(())
    }
}

fn tempdir_beside(dir: &Path) -> Result<PathBuf> {
    let mut name = dir.file_name().context("the cache has a name")?.to_owned();
    name.push(".unfinished");
    let path = dir.with_file_name(name);
    if path.exists() {
        fs::remove_dir_all(&path)?;
    }
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// `go build -v` names each package that it compiles: counts them, and gives the last lines for an error message.
fn show_progress(lines: impl BufRead) -> Result<Vec<String>> {
    let terminal = std::io::stderr().is_terminal();
    let mut last = Vec::new();
    for (count, line) in lines.lines().enumerate() {
        let line = line?;
        if terminal {
            eprint!("\r\x1b[K  {count} packages: {line}");
            std::io::stderr().flush()?;
        } else if count % 250 == 249 {
            eprintln!("  {} packages", count + 1);
        }
        last.push(line);
        if last.len() > 30 {
            last.remove(0);
        }
    }
    if terminal {
        eprintln!();
    }
    Ok(last)
}
