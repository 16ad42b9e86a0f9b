//! The lab: pools of nodes as network namespaces on one machine, with a real API server, NAT and the Raven binaries.
//! Tests, benchmarks and the demo share it.
//!
//! - [`site`] describes a lab; `network` creates its namespaces, links, routes and NAT.
//! - [`kubernetes`] starts etcd and the API server and writes the objects; [`kubelet`] starts real kubelets and further
//!   API servers; [`agent`] starts the Raven binaries, each as a [`process`]. [`real_nodes`] starts everything that real
//!   Pods need on all nodes, instead. [`cni`] starts flannel and kube-router.
//! - [`probe`] and [`capture`] measure, [`eventually()`] retries until a deadline, [`proof`] combines them into checks.
//! - [`evidence`] saves the state of a failed test; [`teardown`] removes a lab, also after its process was killed.
//! - [`cli`] implements `raven-lab` and `cargo xtask lab`.
//! - [`qemu`] boots another kernel for a lab inside it; [`offline`] provides agents with a topology without
//!   an API server.
//!
//! Needs root. Several labs can run side by side.

#![forbid(unsafe_code)]

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

pub mod agent;
pub mod bare;
pub mod capture;
pub mod cargo;
pub mod cli;
pub mod cni;
pub mod eventually;
pub mod evidence;
pub mod flood;
pub mod forge;
pub mod impair;
pub mod kernel_log;
pub mod kubectl;
pub mod kubelet;
pub mod kubernetes;
pub mod memory_limit;
pub mod meter;
pub mod metrics_server;
pub mod namespace;
mod network;
pub mod offline;
pub mod probe;
pub mod process;
pub mod proof;
pub mod qemu;
pub mod real_nodes;
pub mod site;
pub mod teardown;

pub use eventually::{eventually, patience};
pub use namespace::Namespace;
pub use site::{Forward, Masquerade, MasqueradeBy, Nat, Node, Pod, Pool, PoolSpec, Protocol, Site};
pub use teardown::{down, down_all, labs};

use kubernetes::Cluster;
use site::HostLink;
use teardown::{Guardian, LABS};

/// A running lab; dereferences to its [`Site`]. Dropping it removes the lab, unless [`Lab::keep`] was called.
#[derive(Debug)]
pub struct Lab {
    site: Site,
    cluster: Option<Cluster>,
    guardian: Guardian,
    kept: bool,
}

/// Configuration of a lab to build.
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
    /// Sets the pools, the cloud first. Default: [`PoolSpec::three`].
    pub fn pools(mut self, pools: Vec<PoolSpec>) -> Self {
        self.pools = pools;
        self
    }

    /// Sets the number of pods per node. Default: 1.
    pub fn pods_per_node(mut self, pods: u8) -> Self {
        self.pods_per_node = pods;
        self
    }

    /// Sets which traffic the nodes' CNI masquerades, and by which tool.
    pub fn masquerade(mut self, masquerade: Masquerade, by: MasqueradeBy) -> Self {
        self.masquerade = masquerade;
        self.masquerade_by = by;
        self
    }

    /// Builds the network only, without an API server.
    pub fn without_kubernetes(mut self) -> Self {
        self.kubernetes = false;
        self
    }

    /// Omits the CRDs and the manifests of `deploy/`, for tests that install them.
    pub fn without_crds(mut self) -> Self {
        self.crds = false;
        self
    }

    /// Builds the lab: the network first, then the API server with CRDs, RBAC and the Node objects.
    pub async fn up(self) -> Result<Lab> {
        ensure!(nix::unistd::geteuid().is_root(), "the lab needs root to create network namespaces");
        ensure!(!self.pools.is_empty(), "a lab needs at least one pool");
        let (id, dir, link) = claim()?;
        teardown::own(&dir)?;
        teardown::write_script(&id, &dir, &link.device)?;
        let guardian = Guardian::start(&dir)?;
        let mut site = Site::plan(&id, dir, link, &self.pools, self.pods_per_node)?;
        site.masquerade = self.masquerade;
        site.masquerade_by = self.masquerade_by;
        // From here on, dropping the lab removes everything created so far.
        let mut lab = Lab { site, cluster: None, guardian, kept: false };
        network::make_private(&lab.site.dir)?;
        fs::create_dir_all(lab.logs())?;
        fs::write(lab.site.dir.join("site.json"), serde_json::to_vec_pretty(&lab.site)?)?;
        network::build(&lab.site).context("build the lab's network")?;
        if self.kubernetes {
            // The API server starts while links come up.
            lab.cluster = Some(Cluster::start(&lab.site, self.crds).await.context("start the lab's Kubernetes")?);
        }
        network::carrying(&lab.site).await?;
        Ok(lab)
    }
}

/// Claims an unused ID by creating its folder, which is atomic. The ID also selects the link to the host.
fn claim() -> Result<(String, PathBuf, HostLink)> {
    for _ in 0..1000 {
        // In each iteration, because removing the last lab removes the folder.
        fs::create_dir_all(LABS)?;
        let number = random_u16()? & 0x3fff;
        // 169.254.0.0/24 and .255.0/24 are reserved, and clouds answer metadata requests at 169.254.169.254.
        if matches!(number >> 6, 0 | 169 | 255) {
            continue;
        }
        let id = format!("rv{number:04x}");
        let dir = Path::new(LABS).join(&id);
        let link = HostLink::new(&id, number);
        if network::is_taken(link.host)? || fs::create_dir(&dir).is_err() {
            continue;
        }
        return Ok((id, dir, link));
    }
    bail!("no free lab ID: run `cargo xtask lab list`")
}

fn random_u16() -> Result<u16> {
    use std::io::Read;
    let mut bytes = [0; 2];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u16::from_ne_bytes(bytes))
}

/// Return type of a test that may be skipped; see [`require_root!`].
pub trait SkippableTest {
    /// Returns the result of a skipped test.
    fn skipped() -> Self;
}

impl SkippableTest for () {
    fn skipped() -> Self {}
}

impl<E> SkippableTest for Result<(), E> {
    fn skipped() -> Self {
        Ok(())
    }
}

/// Skips the rest of the calling test function unless it runs as root. The message contains the test's name.
#[macro_export]
macro_rules! require_root {
    () => {
        if !$crate::is_privileged($crate::test_name!()) {
            return $crate::SkippableTest::skipped();
        }
    };
}

/// Returns the name of the calling function.
#[macro_export]
macro_rules! test_name {
    () => {{
        fn here() {}
        $crate::enclosing_function(&here)
    }};
}

/// Returns the name of the function that contains the nested function `here`; see [`test_name!`].
#[doc(hidden)]
pub fn enclosing_function<T>(_here: &T) -> &'static str {
    let path = std::any::type_name::<T>().trim_end_matches("::here").trim_end_matches("::{{closure}}");
    path.rsplit("::").next().unwrap_or(path)
}

/// Reports whether this process may build labs. If not, prints that `test` is skipped; with `CI=true`
/// that is a failure.
#[doc(hidden)]
pub fn is_privileged(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
        assert!(!ci, "{test} needs root, and CI must not skip tests");
        eprintln!("{test} SKIPPED: it needs root to create network namespaces");
    }
    root
}

// === impl Lab ===

impl Lab {
    /// Returns a builder of the default lab: three pools and an API server.
    pub fn builder() -> LabBuilder {
        LabBuilder::default()
    }

    /// Returns the description of the lab.
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// Returns the lab's Kubernetes cluster. Panics in a lab built [`LabBuilder::without_kubernetes`].
    pub fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("this lab was built without Kubernetes")
    }

    /// Kills the API server. etcd keeps running with its data.
    pub fn kill_api_server(&mut self) -> Result<()> {
        self.cluster.as_mut().context("this lab was built without Kubernetes")?.kill_api_server()
    }

    /// Starts the API server again and waits until it is ready.
    pub async fn start_api_server(&mut self) -> Result<()> {
        self.cluster.as_mut().context("this lab was built without Kubernetes")?.start_api_server(&self.site).await
    }

    /// Reports whether the lab has a Kubernetes cluster.
    pub fn has_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// Keeps the lab when this value is dropped or this process ends. `raven-lab down` removes it.
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
                eprintln!("lab {} was not removed completely: {error:#}", self.site.id);
            }
        }
        self.guardian.release();
    }
}

impl Site {
    /// Returns the folder with the logs of the lab's processes.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn test_name_is_that_of_the_function() {
        assert_eq!(crate::test_name!(), "test_name_is_that_of_the_function");
    }

    #[tokio::test]
    async fn test_name_is_that_of_the_async_function() {
        assert_eq!(crate::test_name!(), "test_name_is_that_of_the_async_function");
    }
}
