//! Gateways as OpenYurt's users have them. They were stored under OpenYurt's CRD, and Raven's CRD is applied over it: every
//! one can be read, edited and used.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::Api;
use kube::api::{ApiResource, DynamicObject};
use raven_api::gateway::{Endpoint, EndpointType, ExposeType};
use raven_api::{Gateway, GatewayNode, LABEL_GATEWAY};
use raven_tests::agent::WEBHOOK;
use raven_tests::{Lab, eventually, kubernetes::objects::default_gateway, proof, require_root};
use serde_json::{Deserializer, Value, json};

use crate::Running;

/// Time limit for an election, with the start of the webhook.
const SOON: Duration = Duration::from_secs(60);

/// A form of Gateways, with what the controller makes of it.
struct Form {
    /// Name of the file in `tests/l3/upstream`.
    file: &'static str,
    /// Version in which the Gateways are written and stored.
    version: &'static str,
    /// The pools, in the order cloud, edge-x, edge-y.
    pools: [Expected; 3],
}

/// What is expected of a pool.
struct Expected {
    /// Name of its Gateway.
    gateway: &'static str,
    /// Node elected for the tunnel.
    tunnel: &'static str,
    /// Node elected for the proxy.
    proxy: &'static str,
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_v1alpha1_needs_only_the_address_of_the_cloud() {
    require_root!();
    let form = Form::new("documented-v1alpha1", "v1alpha1", ["gw-cloud", "gw-hangzhou", "gw-qingdao"]);
    let running = form.start().await.expect("start the lab");
    running.check(form.is_elected(&running.lab).await);
    for (gateway, type_, cause) in [
        ("gw-cloud", "Ready", "no publicIP is set for cloud-a: other pools dial its InternalIP"),
        ("gw-hangzhou", "Accepted", "endpoint names node x-gone, which does not exist"),
    ] {
        running.check(has_condition(&running.lab, gateway, type_, cause).await);
    }
    let endpoints = json!([{"nodeName": "cloud-a", "publicIP": "198.51.100.10"}, {"nodeName": "cloud-b"}]);
    let patch = json!({"spec": {"endpoints": endpoints}}).to_string();
    let patched =
        running.lab.cluster().kubectl(&["patch", &form.resource(), "gw-cloud", "--type=merge", "--patch", &patch]);
    running.check(patched);
    running.check(form.works(&running.lab).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_v1beta1_works() {
    require_root!();
    let mut form = Form::new("documented-v1beta1", "v1beta1", ["gw-cloud", "gw-hangzhou", "gw-qingdao"]);
    form.pools[2].tunnel = "y-b";
    form.starts_and_works().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn live_v1alpha1_works() {
    require_root!();
    let form = Form::new("live-v1alpha1", "v1alpha1", ["gw-cloud", "gw-edge-x", "gw-edge-y"]);
    form.starts_and_works().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn edge_without_under_nat_works() {
    require_root!();
    let form = Form::new("edge-without-under-nat", "v1beta1", ["cloud", "gw-edge-x", "edge-y"]);
    form.starts_and_works().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exported_v1beta1_works() {
    require_root!();
    let form = Form::new("exported-v1beta1", "v1beta1", ["cloud", "gw-edge-x", "edge-y"]);
    form.starts_and_works().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_values_affect_only_their_own_gateway() {
    require_root!();
    let form = Form::new("invalid-values", "v1beta1", ["gw-cloud", "gw-hangzhou", "gw-qingdao"]);
    let running = form.start().await.expect("start the lab");
    running.check(form.works(&running.lab).await);
    for (gateway, type_, cause) in [
        ("gw-qingdao", "Accepted", "publicIP 47.xxx.xxx.xxx of the endpoint of node y-a is ignored"),
        ("gw-empty", "Ready", "no node in the pool"),
        ("gw-wrong", "Ready", "Raven cannot read this Gateway: spec.endpoints[1].type: unknown variant `Tunnel`"),
        ("gw-nothing", "Ready", "Raven cannot read this Gateway: missing field `spec`"),
    ] {
        running.check(has_condition(&running.lab, gateway, type_, cause).await);
    }
    // A person corrects one of them.
    let patch =
        json!({"spec": {"exposeType": "", "endpoints": [], "proxyConfig": null, "tunnelConfig": null}}).to_string();
    let edited = ["patch", "gateway", "gw-wrong", "--type=merge", "--patch", &patch];
    running.check(running.lab.cluster().kubectl(&edited));
    running.check(has_condition(&running.lab, "gw-wrong", "Ready", "no node in the pool").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_without_expose_type_relay_and_are_dialled() {
    require_root!();
    let lab = Lab::builder().up().await.expect("start the lab");
    for pool in &lab.site().pools {
        let mut gateway = default_gateway(lab.site(), pool);
        gateway.spec.expose_type = ExposeType::Edge;
        lab.cluster().apply_gateway(&gateway).await.expect("apply the Gateway");
    }
    let controller = lab.start_controller().await.expect("start the controller");
    let agents = lab.start_agents().await.expect("start the agents");
    let running = Running { agents, _controller: controller, lab };
    running.check(proof::converged(&running.lab).await.map(drop));
    for node in ["x-a", "y-a"] {
        running.check(proxy_is_connected(&running.lab, node).await);
    }
}

impl Form {
    /// The first node of each pool is expected to be elected for both types.
    fn new(file: &'static str, version: &'static str, [cloud, x, y]: [&'static str; 3]) -> Self {
        let first = |gateway, node| Expected { gateway, tunnel: node, proxy: node };
        Self { file, version, pools: [first(cloud, "cloud-a"), first(x, "x-a"), first(y, "y-a")] }
    }

    async fn starts_and_works(&self) {
        let running = self.start().await.expect("start the lab");
        running.check(self.works(&running.lab).await);
    }

    /// Starts a lab in which the Gateways are stored under OpenYurt's CRD before Raven is installed over it.
    async fn start(&self) -> Result<Running> {
        let lab = Lab::builder().up().await?;
        lab.cluster().apply_foreign_crd(self.version).await?;
        for (pool, Expected { gateway, .. }) in lab.site().pools.iter().zip(&self.pools) {
            for node in lab.site().nodes_of(&pool.spec.name) {
                let label = format!("{LABEL_GATEWAY}={gateway}");
                lab.cluster().kubectl(&["label", "node", &node.name, "--overwrite", &label])?;
            }
        }
        self.store(&lab)?;
        lab.cluster().apply_crds().await?;
        for (pool, Expected { gateway, .. }) in lab.site().pools.iter().zip(&self.pools) {
            if *gateway == pool.spec.name {
                lab.cluster().apply_gateway(&default_gateway(lab.site(), pool)).await?;
            }
        }
        let controller = lab.start_controller_with(&WEBHOOK).await?;
        let agents = lab.start_agents().await?;
        Ok(Running { agents, _controller: controller, lab })
    }

    /// Writes the Gateways of the file as kubectl does, and their status as OpenYurt's controller does.
    fn store(&self, lab: &Lab) -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("l3/upstream/{}.yaml", self.file));
        let with_status = std::fs::read_to_string(&path)?.matches("status:").count();
        let path = path.to_string_lossy();
        lab.cluster().kubectl(&["apply", "--filename", &path])?;
        let objects = lab.cluster().kubectl(&["create", "--dry-run=client", "--output=json", "--filename", &path])?;
        let mut written = 0;
        for object in Deserializer::from_str(&objects).into_iter::<Value>() {
            let object = object?;
            let Some(status) = object.get("status") else { continue };
            let name = object["metadata"]["name"].as_str().context("the Gateway has no name")?;
            let patch = json!({"status": status}).to_string();
            let resource = self.resource();
            let arguments = ["patch", &resource, name, "--subresource=status", "--type=merge", "--patch", &patch];
            lab.cluster().kubectl(&arguments)?;
            written += 1;
        }
        ensure!(written == with_status, "{path}: {written} of {with_status} statuses were written");
        Ok(())
    }

    fn resource(&self) -> String {
        format!("gateways.{}.raven.openyurt.io", self.version)
    }

    /// The nodes are elected as expected; pods of all pools and the tunnels of the kubelets are connected; clients of
    /// both versions can change the Gateways.
    async fn works(&self, lab: &Lab) -> Result<()> {
        self.is_elected(lab).await?;
        proof::converged(lab).await?;
        for Expected { proxy, .. } in &self.pools[1..] {
            proxy_is_connected(lab, proxy).await?;
        }
        for Expected { gateway, .. } in &self.pools {
            for version in ["v1alpha1", "v1beta1"] {
                let resource = format!("gateways.{version}.raven.openyurt.io");
                let label = format!("edited-as={version}");
                lab.cluster().kubectl(&["label", &resource, gateway, &label, "--overwrite"])?;
                // The list contains also those that Raven cannot read.
                lab.cluster().kubectl(&["get", &resource])?;
            }
        }
        self.is_elected(lab).await
    }

    async fn is_elected(&self, lab: &Lab) -> Result<()> {
        let gateways: Api<Gateway> = Api::all(lab.cluster().client());
        for Expected { gateway, tunnel, proxy } in &self.pools {
            eventually(SOON, &format!("the gateway nodes of {gateway} are elected"), async || {
                let status = gateways.get(gateway).await?.status.context("no status")?;
                let elected = |of: EndpointType| -> Vec<&str> {
                    let nodes = status.active_endpoints.iter().filter(|active| active.type_ == of);
                    nodes.map(|active: &Endpoint| active.node_name.as_str()).collect()
                };
                let is = (elected(EndpointType::Tunnel), elected(EndpointType::Proxy));
                ensure!(is == (vec![tunnel], vec![proxy]), "{is:?}: {:?}", status.conditions);
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

async fn has_condition(lab: &Lab, gateway: &str, type_: &str, cause: &str) -> Result<()> {
    let gateways: Api<DynamicObject> = Api::all_with(lab.cluster().client(), &ApiResource::erase::<Gateway>(&()));
    eventually(SOON, &format!("{type_} of {gateway} has the message {cause:?}"), async || {
        let conditions = gateways.get(gateway).await?.data["status"]["conditions"].take();
        let matches = |c: &Value| c["type"] == type_ && c["message"].as_str().is_some_and(|text| text.contains(cause));
        ensure!(conditions.as_array().is_some_and(|all| all.iter().any(matches)), "{conditions}");
        Ok(())
    })
    .await
}

async fn proxy_is_connected(lab: &Lab, node: &str) -> Result<()> {
    let nodes: Api<GatewayNode> = Api::all(lab.cluster().client());
    eventually(SOON, &format!("the L7 half of {node} is connected"), async || {
        let status = nodes.get(node).await?.status.context("no status")?;
        let of_proxy = status.conditions.iter().find(|condition| condition.type_ == "ProxyConnected");
        ensure!(of_proxy.is_some_and(|condition| condition.status == "True"), "{of_proxy:?}");
        Ok(())
    })
    .await
}
