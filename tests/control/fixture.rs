//! The setup of the tests: a lab without nodes, helpers that write Nodes and Gateways, start controllers
//! and read the results.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::FutureExt;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{GetParams, ListParams, Patch, PatchParams, Request};
use raven_api::gateway::{EndpointType, GatewayStatus};
use raven_api::{Gateway, LABEL_GATEWAY};
use raven_tests::agent::binary;
use raven_tests::process::Process;
use raven_tests::{Lab, PoolSpec, eventually, is_privileged};
use serde_json::{Value, json};

/// Time limit for reactions that take the controller one or two reconcile runs.
pub(crate) const SOON: Duration = Duration::from_secs(10);

const MANAGER: &str = "a-person";
/// A Gateway used only by [`Fixture::fence`]; no test asserts on it.
const FENCE: &str = "fence";

/// The lab of a test.
pub(crate) struct Fixture {
    pub lab: Lab,
    pub gateways: Api<Gateway>,
    fences: AtomicU8,
}

/// Runs `test` in its own lab, without a controller. Saves evidence under `name` if it fails.
pub(crate) async fn run(name: &str, test: impl AsyncFnOnce(&Fixture) -> Result<()>) {
    let cloud = PoolSpec { nodes: Vec::new(), ..PoolSpec::new("cloud", "cloud", 0, 10) };
    run_with_pools(vec![cloud], name, test).await;
}

/// Like [`run`], in a lab with the given pools.
pub(crate) async fn run_with_pools(pools: Vec<PoolSpec>, name: &str, test: impl AsyncFnOnce(&Fixture) -> Result<()>) {
    if !is_privileged(name) {
        return;
    }
    // A node's bridge has a carrier only with a pod attached, and the lab waits for carriers.
    let pods_per_node = pools.iter().any(|pool| !pool.nodes.is_empty());
    let lab = Lab::builder().pools(pools).pods_per_node(u8::from(pods_per_node)).up().await.expect("build the lab");
    let gateways = Api::all(lab.cluster().client());
    let fixture = Fixture { lab, gateways, fences: AtomicU8::new(0) };
    let result = AssertUnwindSafe(test(&fixture)).catch_unwind().await;
    if !matches!(result, Ok(Ok(())))
        && let Err(error) = fixture.lab.save_failure(name)
    {
        eprintln!("{error:#}");
    }
    match result {
        Ok(outcome) => {
            outcome.and_then(|()| fixture.ensure_nothing_forbidden()).unwrap_or_else(|error| panic!("{error:?}"));
        }
        Err(panic) => resume_unwind(panic),
    }
}

// === impl Fixture ===

impl Fixture {
    /// Starts a controller as replica `identity`, with the token of its service account.
    pub(crate) async fn controller(&self, identity: &str, args: &[&str]) -> Result<Process> {
        fresh_controller()?;
        let kubeconfig = self.lab.cluster().controller_kubeconfig(&self.lab).await?;
        let mut command = self.lab.control_plane.command(binary("raven-controller")?);
        command.arg("--kubeconfig").arg(kubeconfig).args(["--identity", identity, "--health-probe-addr=127.0.0.1:0"]);
        // Replicas share this namespace and its ports. Tests of the webhook set its address explicitly.
        if args.iter().all(|arg| !arg.starts_with("--webhook")) {
            command.arg("--webhook-bind-addr=off");
        }
        command.args(args);
        Process::start(format!("controller-{identity}"), &self.lab.logs(), command)
    }

    /// Writes Node `name`, ready, with these labels. Its address is 10.1.0.`number`, its prefixes
    /// are 10.244.`number`.0/24 and fd00:244:`number`::/64.
    pub(crate) async fn put_node(&self, name: &str, number: u8, labels: &[(&str, &str)]) -> Result<()> {
        self.put_node_at(name, number, number, labels).await
    }

    /// Like [`Fixture::put_node`], with the address 10.1.0.`host`.
    pub(crate) async fn put_node_at(&self, name: &str, number: u8, host: u8, labels: &[(&str, &str)]) -> Result<()> {
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": {"podCIDR": format!("10.244.{number}.0/24"), "podCIDRs": [format!("10.244.{number}.0/24"), format!("fd00:244:{number}::/64")]},
        });
        for (key, value) in labels {
            object["metadata"]["labels"][key] = json!(value);
        }
        let parameters = PatchParams::apply(MANAGER).force();
        self.nodes()
            .patch(name, &parameters, &Patch::Apply(&object))
            .await
            .with_context(|| format!("apply Node {name}"))?;
        let addresses =
            json!([{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": format!("10.1.0.{host}")}]);
        self.put_node_status(name, MANAGER, json!({"addresses": addresses})).await?;
        self.lab.cluster().set_ready(name, true).await
    }

    /// Writes fields of a Node's status.
    pub(crate) async fn put_node_status(&self, name: &str, manager: &str, status: Value) -> Result<()> {
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": status});
        let parameters = PatchParams::apply(manager).force();
        self.nodes()
            .patch_status(name, &parameters, &Patch::Apply(&object))
            .await
            .map(drop)
            .with_context(|| format!("set the status of Node {name}"))
    }

    /// Sets or removes a Node's label.
    pub(crate) async fn label(&self, node: &str, key: &str, value: Option<&str>) -> Result<()> {
        let patch = json!({"metadata": {"labels": {key: value}}});
        self.nodes()
            .patch(node, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .map(drop)
            .with_context(|| format!("label Node {node}"))
    }

    /// Writes a Gateway as `kubectl apply` does.
    pub(crate) async fn put_gateway(&self, name: &str, spec: Value) -> Result<Gateway> {
        let object = json!({"apiVersion": "raven.openyurt.io/v1beta1", "kind": "Gateway", "metadata": {"name": name}, "spec": spec});
        let parameters = PatchParams::apply(MANAGER).force();
        self.gateways
            .patch(name, &parameters, &Patch::Apply(&object))
            .await
            .with_context(|| format!("apply Gateway {name}"))
    }

    /// Sets the annotation with the additional prefixes of a site.
    pub(crate) async fn put_extra_prefixes(&self, gateway: &str, prefixes: &str) -> Result<()> {
        let patch = json!({"metadata": {"annotations": {raven_api::ANNOTATION_EXTRA_CIDRS: prefixes}}});
        self.gateways
            .patch(gateway, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .map(drop)
            .context("annotate the Gateway")
    }

    /// Writes an exposed Gateway `cloud` with node c-a, and an edge Gateway `site` with x-a and x-b, which prefers
    /// x-b for the tunnel.
    pub(crate) async fn put_two_pools(&self) -> Result<()> {
        self.put_node("c-a", 1, &[(LABEL_GATEWAY, "cloud")]).await?;
        self.put_node("x-a", 2, &[(LABEL_GATEWAY, "site")]).await?;
        self.put_node("x-b", 3, &[(LABEL_GATEWAY, "site")]).await?;
        self.put_gateway(
            "cloud",
            json!({"exposeType": "PublicIP", "endpoints": [{"nodeName": "c-a", "publicIP": "198.51.100.10"}]}),
        )
        .await?;
        self.put_gateway("site", site(&["x-b", "x-a"])).await?;
        Ok(())
    }

    /// Waits until both Gateways of [`Fixture::put_two_pools`] are Ready. The controller then has
    /// no more pending writes.
    pub(crate) async fn two_pools_are_ready(&self) -> Result<()> {
        for name in ["cloud", "site"] {
            self.until(name, "is ready", |gateway| has_condition(gateway, "Ready", "True", "Ready", "")).await?;
        }
        Ok(())
    }

    /// Waits until `check` succeeds for a Gateway.
    pub(crate) async fn until(
        &self,
        name: &str,
        what: &str,
        check: impl Fn(&Gateway) -> Result<()>,
    ) -> Result<Gateway> {
        self.within(SOON, name, what, check).await
    }

    /// Like [`Fixture::until`], with another deadline.
    pub(crate) async fn within(
        &self,
        deadline: Duration,
        name: &str,
        what: &str,
        check: impl Fn(&Gateway) -> Result<()>,
    ) -> Result<Gateway> {
        eventually(deadline, &format!("Gateway {name} {what}"), async || {
            let gateway = self.gateways.get(name).await?;
            check(&gateway).with_context(|| format!("status of the Gateway: {}", json!(gateway.status)))?;
            Ok(gateway)
        })
        .await
    }

    /// Waits until exactly these Gateways exist, ignoring [`FENCE`].
    pub(crate) async fn until_gateways(&self, expected: &[&str]) -> Result<()> {
        eventually(SOON, &format!("exactly the Gateways {expected:?} exist"), async || {
            let all = self.gateways.list(&ListParams::default()).await?;
            let names: Vec<String> =
                all.items.into_iter().filter_map(|g| g.metadata.name).filter(|name| name != FENCE).collect();
            ensure!(names == expected, "the Gateways are {names:?}");
            Ok(())
        })
        .await
    }

    /// Returns the whole object as sent by the API server, for byte-wise comparison.
    pub(crate) async fn raw(&self, gateway: &str) -> Result<String> {
        let request = Request::new("/apis/raven.openyurt.io/v1beta1/gateways").get(gateway, &GetParams::default())?;
        Ok(self.lab.cluster().client().request_text(request).await?)
    }

    /// Waits until the controller has processed all previous changes of Nodes: it receives Nodes in the order of their
    /// changes, so once a later one appears in a status, the earlier ones have been processed. Repeated once, because
    /// the fence's Gateway may be written first in a reconcile run.
    pub(crate) async fn fence(&self) -> Result<()> {
        self.put_gateway(FENCE, json!({})).await?;
        for _ in 0..2 {
            let number = 200 + self.fences.fetch_add(1, Ordering::Relaxed);
            let node = format!("fence-{number}");
            self.put_node(&node, number, &[(LABEL_GATEWAY, FENCE)]).await?;
            let seen = |gateway: &Gateway| {
                ensure!(nodes(gateway).contains(&node.as_str()), "{node} is not listed");
                Ok(())
            };
            self.until(FENCE, "has its newest node", seen).await?;
        }
        Ok(())
    }

    /// Waits for an Event about a Gateway whose note contains `part`. Returns the Event's type.
    pub(crate) async fn event(&self, gateway: &str, reason: &str, part: &str) -> Result<String> {
        let api: Api<Event> = Api::namespaced(self.lab.cluster().client(), "default");
        eventually(SOON, &format!("an Event {reason} about Gateway {gateway} contains {part:?}"), async || {
            let all = api.list(&ListParams::default()).await?.items;
            let about: Vec<&Event> = all
                .iter()
                .filter(|e| e.regarding.as_ref().is_some_and(|r| r.name.as_deref() == Some(gateway)))
                .collect();
            let found = about.iter().find(|e| {
                e.reason.as_deref() == Some(reason) && e.note.as_deref().is_some_and(|note| note.contains(part))
            });
            let seen = || about.iter().map(|e| format!("{:?}: {:?}", e.reason, e.note)).collect::<Vec<_>>().join("\n");
            found.and_then(|e| e.type_.clone()).with_context(|| format!("the Events are:\n{}", seen()))
        })
        .await
    }

    /// Returns the API of Node objects.
    pub(crate) fn nodes(&self) -> Api<Node> {
        Api::all(self.lab.cluster().client())
    }

    // The permissions of deploy/rbac.yaml must be sufficient for everything the controller did in the test.
    fn ensure_nothing_forbidden(&self) -> Result<()> {
        for entry in std::fs::read_dir(self.lab.logs())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("controller-")) {
                let log = std::fs::read_to_string(&path)?;
                let forbidden = log.lines().find(|line| line.to_ascii_lowercase().contains("forbidden"));
                ensure!(forbidden.is_none(), "{}: {}", path.display(), forbidden.unwrap_or_default());
            }
        }
        Ok(())
    }
}

/// Returns the spec of an edge Gateway behind NAT with these nodes as candidates for the tunnel.
pub(crate) fn site(nodes: &[&str]) -> Value {
    let endpoints: Vec<Value> = nodes.iter().map(|name| json!({"nodeName": name, "underNAT": true})).collect();
    json!({ "endpoints": endpoints })
}

/// Returns a Gateway's status; empty before the controller wrote one.
pub(crate) fn status(gateway: &Gateway) -> GatewayStatus {
    gateway.status.clone().unwrap_or_default()
}

/// Returns the names of the nodes in a Gateway's status.
pub(crate) fn nodes(gateway: &Gateway) -> Vec<&str> {
    gateway.status.iter().flat_map(|s| &s.nodes).map(|n| n.node_name.as_str()).collect()
}

/// Returns the nodes elected for the tunnel.
pub(crate) fn tunnel(gateway: &Gateway) -> Vec<&str> {
    let active = gateway.status.iter().flat_map(|s| &s.active_endpoints);
    active.filter(|e| e.type_ == EndpointType::Tunnel).map(|e| e.node_name.as_str()).collect()
}

/// Fails unless exactly these nodes are elected for the tunnel.
pub(crate) fn elects(gateway: &Gateway, expected: &[&str]) -> Result<()> {
    ensure!(tunnel(gateway) == expected, "elected: {:?}, expected: {expected:?}", tunnel(gateway));
    Ok(())
}

/// Fails unless a condition of the current generation has this status and reason, and its message contains `part`.
pub(crate) fn has_condition(gateway: &Gateway, type_: &str, status: &str, reason: &str, part: &str) -> Result<()> {
    let all = gateway.status.iter().flat_map(|s| &s.conditions);
    let condition = all.clone().find(|c| c.type_ == type_).with_context(|| format!("no condition {type_}"))?;
    ensure!(
        (condition.status.as_str(), condition.reason.as_str()) == (status, reason),
        "{type_}: {}",
        json!(condition)
    );
    ensure!(
        condition.message.contains(part),
        "the message of {type_} does not contain {part:?}: {}",
        condition.message
    );
    ensure!(condition.observed_generation == gateway.metadata.generation, "{type_} is of an older generation");
    Ok(())
}

// `cargo test -p raven-tests` does not build the binaries it runs, so the test would use stale ones.
fn fresh_controller() -> Result<()> {
    static BUILT: OnceLock<Result<(), String>> = OnceLock::new();
    let build = || {
        if std::env::var_os("RAVEN_BIN_DIR").is_some() {
            return Ok(());
        }
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("");
        let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
        let built = raven_tests::cargo::command()
            .current_dir(workspace)
            .args(["build", "-q", "-p", "raven-controller", "--profile", profile])
            .output();
        match built {
            Ok(built) if built.status.success() => Ok(()),
            Ok(built) => Err(format!("build raven-controller: {}", String::from_utf8_lossy(&built.stderr))),
            Err(e) => {
                Err(format!("run cargo to build raven-controller: {e} (RAVEN_BIN_DIR can name existing binaries)"))
            }
        }
    };
    BUILT.get_or_init(build).clone().map_err(anyhow::Error::msg)
}
