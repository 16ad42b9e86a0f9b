//! Other people's CNIs and firewalls on the lab's nodes: flannel, and kube-router as the engine of NetworkPolicies.
//!
//! The lab's own bridge and pods stay; only what the CNI does between nodes is replaced.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::Lab;
use crate::kubernetes::binaries::{FLANNEL, KUBE_ROUTER, Module, Programs};
use crate::process::Process;
use crate::site::{CLUSTER_V4, CLUSTER_V6, Node};

/// Returns the programs of a CNI if `cargo xtask setup` could build them. Otherwise prints that `test` is skipped.
pub fn find(module: &Module, test: &str) -> Result<Option<Programs>> {
    let found = module.find()?;
    if found.is_none() {
        // Written directly, because the test harness hides the output of eprintln! in a passing test.
        let mut stderr = std::io::stderr();
        let _ = writeln!(stderr, "SKIPPED: {test}: {} is not built; `cargo xtask setup` says why", module.names);
    }
    Ok(found)
}

impl Lab {
    /// Starts flannel on a node, in place of the lab's routes to the other nodes of its pool. `backend` is a type of
    /// flannel's configuration, such as `vxlan`.
    pub fn start_flannel(&self, node: &Node, backend: &str) -> Result<Process> {
        for other in self.nodes_of(&node.pool).filter(|other| other.name != node.name) {
            node.ns.run("ip", &["route", "del", &other.pod_cidr_v4()])?;
            node.ns.run("ip", &["-6", "route", "del", &other.pod_cidr_v6()])?;
        }
        // The kubelet sets this annotation. Flannel needs a Node with annotations.
        let attach = "volumes.kubernetes.io/controller-managed-attach-detach=true";
        self.cluster().kubectl(&["annotate", "node", &node.name, "--overwrite", attach])?;
        let network = serde_json::json!({
            "Network": CLUSTER_V4, "EnableIPv6": true, "IPv6Network": CLUSTER_V6, "Backend": {"Type": backend},
        });
        let mut command = node.ns.command(program(&FLANNEL, "flannel")?);
        command.env("NODE_NAME", &node.name).args(["--kube-subnet-mgr", "--ip-masq", "--iface=eth0"]);
        command.arg("--kubeconfig-file").arg(self.cni_kubeconfig(node)?);
        command.arg("--net-config-path").arg(write(node, "network.json", &network.to_string())?);
        command.arg("--subnet-file").arg(self.logs().join(format!("{}-subnet.env", node.name)));
        Process::start(format!("flannel-{}", node.name), &self.logs(), command)
    }

    /// Starts kube-router on a node as its firewall only. IPv4 only: version 2.1.0 writes rules for IPv6 that name sets
    /// which do not exist.
    pub fn start_kube_router(&self, node: &Node) -> Result<Process> {
        let mut command = node.ns.command(program(&KUBE_ROUTER, "kube-router")?);
        command.args(["--run-firewall=true", "--run-router=false", "--run-service-proxy=false"]);
        command.arg("--hostname-override").arg(&node.name).arg("--kubeconfig").arg(self.cni_kubeconfig(node)?);
        Process::start(format!("kube-router-{}", node.name), &self.logs(), command)
    }

    fn cni_kubeconfig(&self, node: &Node) -> Result<PathBuf> {
        let cluster = self.cluster();
        write(node, "kubeconfig", &cluster.admin_kubeconfig(&cluster.server_for(self, node)))
    }
}

fn write(node: &Node, name: &str, text: &str) -> Result<PathBuf> {
    let dir = node.dir.join("cni");
    std::fs::create_dir_all(&dir)?;
    let path = dir.join(name);
    std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

fn program(module: &Module, name: &str) -> Result<PathBuf> {
    Ok(module.find()?.with_context(|| format!("{} is not built", module.names))?.program(name))
}
