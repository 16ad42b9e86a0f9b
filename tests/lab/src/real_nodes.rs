//! Nodes as in a user's cluster: each runs containerd, a kubelet, a CNI and kube-proxy, and the control plane runs
//! the scheduler and the controllers. What `kubectl apply` installs on them runs as real Pods.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::api::{Api, ListParams};
use serde_json::json;

use crate::Lab;
use crate::eventually;
use crate::kubelet::Kubelet;
use crate::kubernetes::FIRST_SERVICE;
use crate::kubernetes::binaries::{NODE, Programs, WORKLOADS};
use crate::process::Process;
use crate::site::{API_PORT, Node};

/// Time limit until all nodes are Ready; six take about a minute on two processors.
const READY_WITHIN: Duration = Duration::from_secs(180);
/// First address number of a node's pod range that the CNI assigns; lower ones belong to the lab's own pods.
const FIRST_POD: u8 = 100;

/// The programs of all nodes. They end when this value is dropped.
#[derive(Debug)]
pub struct RealNodes {
    kubelets: Vec<Kubelet>,
    _programs: Vec<Process>,
}

impl RealNodes {
    /// Imports an image archive on every node.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.kubelets.iter().try_for_each(|kubelet| kubelet.import(archive))
    }

    /// Gives an imported image a second name on every node.
    pub fn tag(&self, image: &str, other: &str) -> Result<()> {
        for kubelet in &self.kubelets {
            kubelet.ctr(&["images", "tag", "--force", image, other])?;
        }
        Ok(())
    }
}

impl Lab {
    /// Starts the programs of all nodes, the scheduler and the controllers, and waits until all nodes are Ready.
    pub async fn start_real_nodes(&self) -> Result<RealNodes> {
        let (programs, workloads) = (NODE.find_or_build().await?, WORKLOADS.find_or_build().await?);
        let mut running = vec![
            self.control_program(
                &workloads,
                "kube-controller-manager",
                &[
                    format!("--root-ca-file={}", self.cluster().file("ca.crt").display()),
                    format!(
                        "--service-account-private-key-file={}",
                        self.cluster().file("service-account.key").display()
                    ),
                ],
            )?,
            self.control_program(&workloads, "kube-scheduler", &[])?,
        ];
        for node in &self.nodes {
            running.push(self.real_node(node, &programs)?);
        }
        let kubelets = try_join_all(self.nodes.iter().map(|node| self.start_kubelet(&node.name))).await?;
        self.nodes_ready().await?;
        Ok(RealNodes { kubelets, _programs: running })
    }

    fn control_program(&self, programs: &Programs, name: &str, arguments: &[String]) -> Result<Process> {
        let mut command = self.control_plane.command(programs.program(name));
        command.arg("--kubeconfig").arg(self.cluster().kubeconfig()).arg("--leader-elect=false");
        command.arg("--cert-dir").arg(self.dir.join(name)).args(arguments);
        Process::start(name, &self.logs(), command)
    }

    /// Prepares a node for its kubelet and starts its kube-proxy.
    fn real_node(&self, node: &Node, programs: &Programs) -> Result<Process> {
        let dir = node.dir.join("kubelet");
        fs::create_dir_all(dir.join("cni"))?;
        fs::write(dir.join("cni/10-lab.conflist"), cni(node))?;
        if node.pool != self.cloud().spec.name {
            // Only the cloud reaches the address at which the Service `kubernetes` ends. Edge nodes use the public one
            // instead, which a node of a real cluster gets from its distribution (OpenYurt's yurthub).
            let rule = format!("ip daddr {FIRST_SERVICE} tcp dport 443 dnat to {}:{API_PORT}", self.cloud().public_v4);
            node.ns.nft(&format!(
                "table ip lab-api {{
  chain output {{ type nat hook output priority -150; {rule}; }}
  chain prerouting {{ type nat hook prerouting priority -150; {rule}; }}
}}
"
            ))?;
        }
        self.start_kube_proxy(node, &dir, programs)
    }

    async fn nodes_ready(&self) -> Result<()> {
        let api: Api<NodeObject> = Api::all(self.cluster().client());
        eventually(READY_WITHIN, "the kubelets of all nodes report Ready", || async {
            for node in api.list(&ListParams::default()).await? {
                let name = node.metadata.name.unwrap_or_default();
                let status = node.status.context("the Node has no status")?;
                // The lab itself has set the condition before, but only a kubelet reports its version.
                ensure!(
                    status.node_info.is_some_and(|info| !info.kubelet_version.is_empty()),
                    "the kubelet of {name} has not reported"
                );
                let ready = status.conditions.unwrap_or_default().into_iter().find(|c| c.type_ == "Ready");
                ensure!(ready.as_ref().is_some_and(|c| c.status == "True"), "{name}: {ready:?}");
                let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
                ensure!(taints.is_empty(), "{name} has taints: {taints:?}");
            }
            Ok(())
        })
        .await
    }
}

/// Returns the CNI's configuration: the bridge that the lab's own pods use, too.
fn cni(node: &Node) -> String {
    let range = |subnet: String, first: String, gateway: String| json!([{ "subnet": subnet, "rangeStart": first, "gateway": gateway }]);
    json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": node.dir.join("kubelet/cni-addresses"),
                "ranges": [
                    range(node.pod_cidr_v4(), node.pod_v4(FIRST_POD).to_string(), node.pod_v4(1).to_string()),
                    range(node.pod_cidr_v6(), node.pod_v6(FIRST_POD).to_string(), node.pod_v6(1).to_string()),
                ],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        }],
    })
    .to_string()
}
