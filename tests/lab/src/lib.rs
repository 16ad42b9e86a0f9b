//! The lab: pools of nodes as network namespaces on one machine, with a real API server, real NAT and the real Raven binaries.
//! Tests, benchmarks and the demo share it.
//!
//! In the order a lab comes to life: [`site`] says what it consists of; [`wire`] builds namespaces, links, routes and NAT;
//! [`kubernetes`] starts etcd and the API server and writes the objects; [`agent`] starts the Raven binaries ([`process`]); [`kubelet`] real kubelets and further API
//! servers, where a test needs them;
//! [`probe`] and [`capture`] find out what works, [`eventually`] waits for it; [`evidence`] saves what a failed test leaves;
//! [`teardown`] takes everything away, also when the lab's own process was killed. [`console`] is `raven-lab` and `cargo xtask lab`.
//! [`qemu`] boots another kernel, for a lab inside it; [`offline`] feeds agents where there is no API server.
//!
//! Needs root. Several labs may run side by side.

#![forbid(unsafe_code)]

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

pub mod agent;
pub mod capture;
pub mod console;
pub mod eventually;
pub mod evidence;
pub mod impair;
pub mod kernel_log;
pub mod kubectl;
pub mod kubelet;
pub mod kubernetes;
pub mod metrics_server;
pub mod namespace;
pub mod offline;
pub mod probe;
pub mod process;
pub mod proof;
pub mod qemu;
pub mod site;
pub mod teardown;
mod wire;

pub use eventually::{eventually, patience};
pub use namespace::Namespace;
pub use site::{Forward, Masquerade, MasqueradeBy, Nat, Node, Pod, Pool, PoolSpec, Protocol, Site};
pub use teardown::{down, down_all, labs};

use kubernetes::Cluster;
use site::HostLink;
use teardown::{Guardian, LABS};

/// A running lab; dereferences to its [`Site`]. Taken away when dropped, unless [`Lab::keep`] was called.
#[derive(Debug)]
pub struct Lab {
    site: Site,
    cluster: Option<Cluster>,
    guardian: Guardian,
    kept: bool,
}

/// What lab to build.
#[derive(Clone, Debug)]
pub struct LabBuilder {
    pools: Vec<PoolSpec>,
    pods_per_node: u8,
    masquerade: Masquerade,
    masquerade_by: MasqueradeBy,
    kubernetes: bool,
    crds: bool,
}

impl Default for LabBuilder {
    fn default() -> Self {
        Self {
            pools: PoolSpec::three(),
            pods_per_node: 1,
            masquerade: Masquerade::default(),
            masquerade_by: MasqueradeBy::default(),
            kubernetes: true,
            crds: true,
        }
    }
}

impl LabBuilder {
    /// The pools, the cloud first. Left out: [`PoolSpec::three`].
    pub fn pools(mut self, pools: Vec<PoolSpec>) -> Self {
        self.pools = pools;
        self
    }

    /// How many pods each node has; 1 when left out.
    pub fn pods_per_node(mut self, pods: u8) -> Self {
        self.pods_per_node = pods;
        self
    }

    /// What the nodes' CNI masquerades.
    pub fn masquerade(mut self, masquerade: Masquerade, by: MasqueradeBy) -> Self {
        self.masquerade = masquerade;
        self.masquerade_by = by;
        self
    }

    /// Leaves the API server out: network only.
    pub fn without_kubernetes(mut self) -> Self {
        self.kubernetes = false;
        self
    }

    /// Leaves the CRDs and the manifests of `deploy/` out: for tests that install them themselves.
    pub fn without_crds(mut self) -> Self {
        self.crds = false;
        self
    }

    /// Builds it: network first, then the API server with CRDs, RBAC and the Node objects.
    pub async fn up(self) -> Result<Lab> {
        ensure!(nix::unistd::geteuid().is_root(), "the lab needs root: it makes network namespaces");
        ensure!(!self.pools.is_empty(), "a lab needs a pool");
        let (id, dir, link) = claim()?;
        teardown::own(&dir)?;
        teardown::write_script(&id, &dir, &link.device)?;
        let guardian = Guardian::start(&dir)?;
        let mut site = Site::plan(&id, dir, link, &self.pools, self.pods_per_node)?;
        site.masquerade = self.masquerade;
        site.masquerade_by = self.masquerade_by;
        // From here on dropping the lab takes away whatever is there.
        let mut lab = Lab { site, cluster: None, guardian, kept: false };
        wire::make_private(&lab.site.dir)?;
        fs::create_dir_all(lab.logs())?;
        fs::write(lab.site.dir.join("site.json"), serde_json::to_vec_pretty(&lab.site)?)?;
        wire::build(&lab.site).context("build the lab's network")?;
        if self.kubernetes {
            // While links come up, the API server does, too.
            lab.cluster = Some(Cluster::start(&lab.site, self.crds).await.context("start the lab's Kubernetes")?);
        }
        wire::carrying(&lab.site).await?;
        Ok(lab)
    }
}

/// Takes an id that nobody has: making the folder decides. The id also picks the link to the host.
fn claim() -> Result<(String, PathBuf, HostLink)> {
    for _ in 0..1000 {
        // Again each time: the last lab that goes takes the folder with it.
        fs::create_dir_all(LABS)?;
        let number = random_u16()? & 0x3fff;
        // 169.254.0.0/24 and .255.0/24 are reserved, and clouds answer metadata requests at 169.254.169.254.
        if matches!(number >> 6, 0 | 169 | 255) {
            continue;
        }
        let id = format!("rv{number:04x}");
        let dir = Path::new(LABS).join(&id);
        let link = HostLink::new(&id, number);
        if wire::is_taken(link.host)? || fs::create_dir(&dir).is_err() {
            continue;
        }
        return Ok((id, dir, link));
    }
    bail!("no free lab id: see `cargo xtask lab list`")
}

fn random_u16() -> Result<u16> {
    use std::io::Read;
    let mut bytes = [0; 2];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u16::from_ne_bytes(bytes))
}

/// True if this process may build labs. Else says that `test` was left out and why; under `CI=true` that is a failure.
pub fn privileged(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
        assert!(!ci, "{test} needs root, and CI must leave nothing out");
        eprintln!("{test} LEFT OUT: it needs root (it makes network namespaces)");
    }
    root
}

// === impl Lab ===

impl Lab {
    /// The three pools with an API server; change what you need.
    pub fn builder() -> LabBuilder {
        LabBuilder::default()
    }

    /// What the lab consists of.
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// The lab's Kubernetes. Panics in a lab built without.
    pub fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("this lab was built without Kubernetes")
    }

    /// Kills the API server; etcd and what is in it stay.
    pub fn kill_api_server(&mut self) -> Result<()> {
        self.cluster.as_mut().context("this lab was built without Kubernetes")?.kill_api_server()
    }

    /// Starts it again, and waits until it is ready.
    pub async fn start_api_server(&mut self) -> Result<()> {
        self.cluster.as_mut().context("this lab was built without Kubernetes")?.start_api_server(&self.site).await
    }

    /// True unless built [`LabBuilder::without_kubernetes`].
    pub fn has_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// The lab stays when this value is dropped, and when this process ends; `raven-lab down` takes it away.
    pub fn keep(&mut self) -> Result<()> {
        fs::write(self.site.dir.join("keep"), "").context("mark the lab as kept")?;
        self.kept = true;
        Ok(())
    }
}

impl Deref for Lab {
    type Target = Site;

    fn deref(&self) -> &Site {
        &self.site
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.kept {
            drop(self.cluster.take());
            if let Err(error) = teardown::run_script(&self.site.dir) {
                eprintln!("lab {} was not taken away whole: {error:#}", self.site.id);
            }
        }
        self.guardian.release();
    }
}

impl Site {
    /// Where logs of the lab's processes lie.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }
}
