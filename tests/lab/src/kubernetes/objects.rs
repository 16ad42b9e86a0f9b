//! Writes the objects that Raven reads: Nodes as a kubelet would, Gateways as a user would.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Node as NodeObject};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use raven_api::gateway::{Endpoint, ExposeType, Gateway, GatewaySpec};
use raven_api::schema::GATEWAY_CRD;
use raven_api::{GROUP, LABEL_EDGE_WORKER, LABEL_GATEWAY};
use serde_json::{Value, json};

use super::Cluster;
use crate::eventually;
use crate::site::{Node, Pool, Site};

/// Field manager of the lab's writes.
const MANAGER: &str = "raven-lab";
const SOON: Duration = Duration::from_secs(30);

impl Cluster {
    /// Writes the Node objects.
    pub(super) async fn apply_nodes(&self, site: &Site) -> Result<()> {
        for node in &site.nodes {
            self.apply_node(site, node).await?;
        }
        Ok(())
    }

    /// Applies the CRDs of `raven-api` and waits until they are served.
    pub async fn apply_crds(&self) -> Result<()> {
        let api: Api<CustomResourceDefinition> = Api::all(self.client());
        for crd in raven_api::schema::crds()? {
            let name = crd.metadata.name.clone().context("a CRD has a name")?;
            api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&crd))
                .await
                .with_context(|| format!("apply CRD {name}"))?;
            eventually(SOON, &format!("CRD {name} is served"), async || {
                let status = api.get(&name).await?.status;
                let conditions = status.and_then(|s| s.conditions).unwrap_or_default();
                ensure!(conditions.iter().any(|c| c.type_ == "Established" && c.status == "True"), "{conditions:?}");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Replaces the CRD of Gateways by one with OpenYurt's names and versions, which accepts every field and stores the
    /// given version. [`Cluster::apply_crds`] then applies Raven's over it.
    pub async fn apply_foreign_crd(&self, storage: &str) -> Result<()> {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client());
        crds.delete(GATEWAY_CRD, &DeleteParams::default()).await?;
        let version = |name: &str| {
            json!({
                "name": name,
                "served": true,
                "storage": name == storage,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            })
        };
        let names = json!({
            "kind": "Gateway", "listKind": "GatewayList", "plural": "gateways", "singular": "gateway", "shortNames": ["gw"],
        });
        let crd: CustomResourceDefinition = serde_json::from_value(json!({
            "metadata": {"name": GATEWAY_CRD},
            "spec": {
                "group": GROUP, "names": names, "scope": "Cluster",
                "versions": [version("v1alpha1"), version("v1beta1")],
            },
        }))?;
        eventually(SOON, "the CRD is replaced", async || {
            crds.create(&PostParams::default(), &crd).await?;
            Ok(())
        })
        .await?;
        eventually(SOON, "the CRD is served", async || {
            self.kubectl(&["get", &format!("gateways.{storage}.{GROUP}")]).map(drop)
        })
        .await
    }

    /// Applies the manifests of `deploy/` except workloads, which need kubelets: RBAC and the admission policy.
    pub fn apply_manifests(&self) -> Result<()> {
        for file in manifests()? {
            let path = file.to_string_lossy();
            self.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &path])
                .with_context(|| format!("apply {path}"))?;
        }
        Ok(())
    }

    /// Writes the Node object of a node: ready, and labelled as a node of its pool.
    pub async fn apply_node(&self, site: &Site, node: &Node) -> Result<()> {
        let edge = node.pool != site.cloud().spec.name;
        let object = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name, "labels": {
                "kubernetes.io/hostname": node.name,
                "kubernetes.io/os": "linux",
                LABEL_EDGE_WORKER: edge.to_string(),
                LABEL_GATEWAY: node.pool,
            }},
            "spec": {
                "podCIDR": node.pod_cidr_v4(),
                "podCIDRs": [node.pod_cidr_v4(), node.pod_cidr_v6()],
            },
        });
        let api: Api<NodeObject> = Api::all(self.client());
        let parameters = PatchParams::apply(MANAGER).force();
        api.patch(&node.name, &parameters, &Patch::Apply(&object))
            .await
            .with_context(|| format!("apply Node {}", node.name))?;
        let internal = node.addresses().into_iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()}));
        let all: Vec<Value> = internal.chain([json!({"type": "Hostname", "address": node.name})]).collect();
        let addresses = json!({"status": {"addresses": all}});
        // A merge patch, as a kubelet sends it: server-side apply refuses two addresses of one type.
        api.patch_status(&node.name, &PatchParams::default(), &Patch::Merge(&addresses))
            .await
            .with_context(|| format!("set the addresses of Node {}", node.name))?;
        self.set_ready(&node.name, true).await
    }

    /// Sets a Node's Ready condition to `True`, or to `Unknown` as for a kubelet that stopped reporting.
    pub async fn set_ready(&self, node: &str, ready: bool) -> Result<()> {
        let (status, reason) = if ready { ("True", "KubeletReady") } else { ("Unknown", "NodeStatusUnknown") };
        let conditions = json!({"conditions": [{"type": "Ready", "status": status, "reason": reason}]});
        self.patch_node_status(node, "raven-lab-ready", conditions).await
    }

    async fn patch_node_status(&self, node: &str, manager: &str, status: Value) -> Result<()> {
        let api: Api<NodeObject> = Api::all(self.client());
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}, "status": status});
        let parameters = PatchParams::apply(manager).force();
        let patched = api.patch_status(node, &parameters, &Patch::Apply(&object)).await;
        patched.map(drop).with_context(|| format!("set the status of Node {node}"))
    }

    /// Sets a key of a ConfigMap that a user writes (`raven-cfg`, `raven-agent-config`).
    pub async fn put_setting(&self, map: &str, key: &str, value: &str) -> Result<()> {
        let api: Api<ConfigMap> = Api::namespaced(self.client(), raven_api::DEFAULT_NAMESPACE);
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": map}, "data": {key: value}});
        let patched = api.patch(map, &PatchParams::apply(MANAGER), &Patch::Apply(&object)).await;
        patched.map(drop).with_context(|| format!("set {key} of ConfigMap {map}"))
    }

    /// Sets `spec.encryption` of a Gateway, as a user does.
    pub fn set_encryption(&self, gateway: &str, encryption: &str) -> Result<()> {
        let patch = json!({"spec": {"encryption": encryption}}).to_string();
        self.kubectl(&["patch", "gateway", gateway, "--type=merge", "--patch", &patch]).map(drop)
    }

    /// Deletes a Node object.
    pub async fn delete_node(&self, node: &str) -> Result<()> {
        let api: Api<NodeObject> = Api::all(self.client());
        api.delete(node, &DeleteParams::default()).await.map(drop).with_context(|| format!("delete Node {node}"))
    }

    /// Writes a Gateway and returns it as stored.
    pub async fn apply_gateway(&self, gateway: &Gateway) -> Result<Gateway> {
        let api: Api<Gateway> = Api::all(self.client());
        let name = gateway.metadata.name.clone().context("a Gateway needs a name")?;
        let parameters = PatchParams::apply(MANAGER).force();
        let object = json!({
            "apiVersion": "raven.openyurt.io/v1beta1",
            "kind": "Gateway",
            "metadata": {"name": name, "labels": gateway.metadata.labels, "annotations": gateway.metadata.annotations},
            "spec": gateway.spec,
        });
        api.patch(&name, &parameters, &Patch::Apply(&object)).await.with_context(|| format!("apply Gateway {name}"))
    }

    /// Writes the Gateways of all pools; see [`default_gateway`].
    pub async fn apply_gateways(&self, site: &Site) -> Result<()> {
        for pool in &site.pools {
            self.apply_gateway(&default_gateway(site, pool)).await?;
        }
        Ok(())
    }
}

/// Returns the Gateway that a user would write for a pool: exposed, with the nodes to which the router maps UDP 4500.
/// Without such a mapping: an edge behind NAT with all its nodes as candidates. Where a pool has only IPv6, others are
/// dialled by their IPv6 addresses.
pub fn default_gateway(site: &Site, pool: &Pool) -> Gateway {
    let ipv6 = site.nodes.iter().any(|node| node.ipv6_only);
    let public_ip = if ipv6 { pool.public_v6.to_string() } else { pool.public_v4.to_string() };
    let nodes = || site.nodes_of(&pool.spec.name);
    let exposed: Vec<Endpoint> = pool
        .spec
        .forwards
        .iter()
        .filter(|f| f.port == raven_api::DEFAULT_TUNNEL_PORT)
        .filter_map(|f| Some((f, nodes().find(|n| n.lan_v4 == f.to)?)))
        .map(|(f, node)| Endpoint {
            node_name: node.name.clone(),
            port: Some(f.port.into()),
            public_port: (f.public_port != f.port).then_some(f.public_port.into()),
            public_ip: Some(public_ip.clone()),
            ..Endpoint::default()
        })
        .collect();
    let spec = if exposed.is_empty() {
        let endpoint = |node: &Node| Endpoint { node_name: node.name.clone(), under_nat: true, ..Endpoint::default() };
        GatewaySpec { endpoints: nodes().map(endpoint).collect(), ..GatewaySpec::default() }
    } else {
        GatewaySpec { expose_type: ExposeType::PublicIP, endpoints: exposed, ..GatewaySpec::default() }
    };
    Gateway::new(&pool.spec.name, spec)
}

/// Returns the files of `deploy/` that the lab applies, sorted. CRDs are not among them; they come from the Rust types.
fn manifests() -> Result<Vec<PathBuf>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy");
    let mut files = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        if !text
            .lines()
            .any(|line| matches!(line.trim_end(), "kind: DaemonSet" | "kind: Deployment" | "kind: Kustomization"))
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
