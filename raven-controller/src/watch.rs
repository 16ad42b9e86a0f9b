//! Watches of the API server. Each task sends [`Update`]s to [`cluster::run`](crate::cluster::run); each kind is
//! watched once for both halves.

use std::fmt::Debug;
use std::pin::pin;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::DynamicObject;
use kube::discovery::ApiResource;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use raven_api::guarded::{Guarded, UnreadableLog};
use raven_api::names::{AGENT_PODS, API_SERVER_NAMESPACE, API_SERVER_SLICE, SWITCHES_CONFIG_MAP};
use raven_api::proxy::{INTERNAL_SERVICE, LABEL_GATEWAY_TYPE};
use raven_api::{Gateway, GatewayNode};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::cluster::{ObservedGatewayNode, Update};

/// A kind of another project whose CRD may be absent.
#[derive(Debug)]
struct OptionalKind {
    crd: &'static str,
    group: &'static str,
    // In order of preference.
    versions: &'static [&'static str],
    kind: &'static str,
    plural: &'static str,
    wrap: fn(Event<Guarded<DynamicObject>>) -> Update,
    absent: fn() -> Update,
}

/// NodePools of OpenYurt.
static NODE_POOLS: OptionalKind = OptionalKind {
    crd: "nodepools.apps.openyurt.io",
    group: "apps.openyurt.io",
    versions: &["v1beta1", "v1beta2", "v1alpha1"],
    kind: "NodePool",
    plural: "nodepools",
    wrap: Update::Pool,
    absent: || Update::PoolsAbsent,
};

/// Blocks of Calico's IPAM: one watch for the whole cluster.
static BLOCKS: OptionalKind = OptionalKind {
    crd: "blockaffinities.crd.projectcalico.org",
    group: "crd.projectcalico.org",
    versions: &["v1"],
    kind: "BlockAffinity",
    plural: "blockaffinities",
    wrap: Update::Block,
    absent: || Update::BlocksAbsent,
};

// An upgrade of the API server adds ServiceCIDRs, which is rare.
const SERVICE_CIDR_RETRY: Duration = Duration::from_secs(600);
// Number of consecutive 403 and 404 responses after which a kind counts as unavailable. A starting API server, or one
// without Raven's RBAC yet, refuses for a moment, and decisions without the missing facts would be wrong.
const REFUSALS: u32 = 3;

/// Returns the tasks of all watches, with a name for each. They end only when the receiver of the updates is dropped.
pub(crate) fn tasks(
    client: &Client,
    namespace: &str,
    updates: &mpsc::Sender<Update>,
) -> Vec<(&'static str, BoxFuture<'static, ()>)> {
    let all = watcher::Config::default;
    let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
    let (client, send) = (|| client.clone(), || updates.clone());
    let services = || Api::<Service>::namespaced(client(), namespace);
    let gateways = guarded(UnreadableLog::of_gateways(), Api::<Guarded<Gateway>>::all(client()), all());
    let nodes = guarded(UnreadableLog::new("Node"), Api::<Guarded<Node>>::all(client()), all());
    let agents = guarded(
        UnreadableLog::new("Pod"),
        Api::<Guarded<Pod>>::namespaced(client(), namespace),
        watcher::Config::default().labels(AGENT_PODS),
    );
    let config_maps = Api::<ConfigMap>::namespaced(client(), namespace);
    let switches = events(config_maps, named(SWITCHES_CONFIG_MAP));
    // Two watches of Services with different selectors. Upstream's load balancers lack the label of the controller, so
    // one selector cannot match both kinds of Services.
    let balancers = events(services(), watcher::Config::default().labels(LABEL_GATEWAY_TYPE));
    let internal_service = events(services(), named(INTERNAL_SERVICE));
    let slices = Api::<EndpointSlice>::namespaced(client(), API_SERVER_NAMESPACE);
    let api_servers = events(slices, named(API_SERVER_SLICE));
    vec![
        ("watch of Gateways", follow("Gateway", gateways, send(), Update::Gateway, None).boxed()),
        ("watch of Nodes", follow("Node", nodes, send(), Update::Node, None).boxed()),
        (
            "watch of the agents' Pods",
            follow("Pod", agents, send(), Update::Agent, Some(|| Update::AgentsUnavailable)).boxed(),
        ),
        (
            "watch of ConfigMap raven-cfg",
            follow("ConfigMap", switches, send(), Update::Switches, Some(|| Update::SwitchesUnavailable)).boxed(),
        ),
        (
            "watch of GatewayNodes",
            follow(
                "GatewayNode",
                gateway_nodes(client()),
                send(),
                Update::GatewayNode,
                Some(|| Update::GatewayNodesUnavailable),
            )
            .boxed(),
        ),
        (
            "watch of load balancers",
            follow("Service", balancers, send(), Update::Balancer, Some(|| Update::BalancersUnavailable)).boxed(),
        ),
        (
            "watch of the internal Service",
            follow("Service", internal_service, send(), Update::InternalService, None).boxed(),
        ),
        (
            "watch of the API server's addresses",
            follow("EndpointSlice", api_servers, send(), Update::ApiServer, Some(|| Update::ApiServerUnavailable))
                .boxed(),
        ),
        ("watch of ServiceCIDRs", follow_service_cidrs(client(), send()).boxed()),
        ("watch of BlockAffinities", follow_optional(client(), &BLOCKS, send()).boxed()),
        ("watch of NodePools", follow_optional(client(), &NODE_POOLS, send()).boxed()),
    ]
}

/// Watches objects of kinds that the API server validates. They are readable, unless there is a defect; the watch then
/// fails until it is fixed.
fn events<K>(api: Api<K>, config: watcher::Config) -> impl Stream<Item = watcher::Result<Event<K>>> + Send + use<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(api, config).default_backoff()
}

/// Watches objects that a node writes about itself (agent, kubelet, CNI), and Gateways, which may be older than Raven's
/// CRD. An unreadable object is logged once; all but Gateways then count as absent.
pub(crate) fn guarded<K>(
    mut log: UnreadableLog,
    api: Api<Guarded<K>>,
    config: watcher::Config,
) -> impl Stream<Item = watcher::Result<Event<Guarded<K>>>> + Send
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    events(api, config).inspect_ok(move |event| match event {
        Event::Apply(object) | Event::InitApply(object) => log_unreadable(&mut log, object),
        Event::Delete(object) => log.forget(&object.name_any()),
        Event::Init | Event::InitDone => {}
    })
}

fn log_unreadable<K: Resource>(log: &mut UnreadableLog, object: &Guarded<K>) {
    if let Some(error) = log.first_failure(object) {
        let name = object.name_any();
        tracing::warn!(kind = log.kind(), name, error, "object is unreadable; {}", log.advice());
    }
}

// GatewayNodes are parsed twice: the link reports leniently, the rest only if the complete object is readable.
fn gateway_nodes(client: Client) -> impl Stream<Item = watcher::Result<Event<ObservedGatewayNode>>> + Send {
    let api = Api::<Guarded<DynamicObject>>::all_with(client, &ApiResource::erase::<GatewayNode>(&()));
    let mut log = UnreadableLog::new("GatewayNode");
    let parse = |object, log: &mut UnreadableLog| {
        let (observed, typed) = ObservedGatewayNode::parse(object);
        log_unreadable(log, &typed);
        observed
    };
    events(api, watcher::Config::default()).map_ok(move |event| match event {
        Event::Apply(object) => Event::Apply(parse(object, &mut log)),
        Event::InitApply(object) => Event::InitApply(parse(object, &mut log)),
        Event::Delete(object) => {
            log.forget(&object.name_any());
            Event::Delete(ObservedGatewayNode::parse(object).0)
        }
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
    })
}

async fn follow<K>(
    kind: &'static str,
    events: impl Stream<Item = watcher::Result<Event<K>>>,
    updates: mpsc::Sender<Update>,
    wrap: fn(Event<K>) -> Update,
    unavailable: Option<fn() -> Update>,
) {
    let mut events = pin!(events);
    let mut refusals = 0;
    while let Some(event) = events.next().await {
        let update = match event {
            Ok(event) => {
                refusals = 0;
                Some(wrap(event))
            }
            Err(e) => {
                tracing::warn!(kind, error = %e, "watch failed; retrying (check that the CRD is installed and that RBAC allows list and watch)");
                refusals += u32::from(is_refusal(&e));
                unavailable.filter(|_| refusals >= REFUSALS).map(|update| update())
            }
        };
        let Some(update) = update else { continue };
        if updates.send(update).await.is_err() {
            return;
        }
    }
}

fn is_refusal(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    matches!(error, InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status)) | WatchFailed(kube::Error::Api(status))
        if matches!(status.code, 403 | 404))
}

/// Watches ServiceCIDRs (Kubernetes 1.33 and later). Checks periodically whether the API server has them.
async fn follow_service_cidrs(client: Client, updates: mpsc::Sender<Update>) {
    let mut logged = false;
    loop {
        match client.list_api_group_resources("networking.k8s.io/v1").await {
            Ok(list) if list.resources.iter().any(|r| r.name == "servicecidrs") => break,
            Ok(_) if !logged => {
                tracing::warn!(
                    "this API server has no ServiceCIDR objects; set --service-cidr to the range of Service addresses, so that no Gateway can claim it"
                );
                logged = true;
            }
            Ok(_) => {}
            Err(e) => tracing::warn!(error = %e, "cannot list the resources of networking.k8s.io/v1; retrying"),
        }
        if updates.send(Update::ServiceCidrsUnavailable).await.is_err() {
            return;
        }
        tokio::time::sleep(SERVICE_CIDR_RETRY).await;
    }
    let ranges = events(Api::<ServiceCIDR>::all(client), watcher::Config::default());
    follow("ServiceCIDR", ranges, updates, Update::ServiceCidr, Some(|| Update::ServiceCidrsUnavailable)).await;
}

/// Watches all objects of a kind while its CRD is installed. Follows the installation, the removal and the served
/// versions of the CRD.
async fn follow_optional(client: Client, optional: &'static OptionalKind, updates: mpsc::Sender<Update>) {
    let only = watcher::Config::default().fields(&format!("metadata.name={}", optional.crd));
    let mut crds = pin!(watcher(Api::<CustomResourceDefinition>::all(client.clone()), only).default_backoff());
    let mut installed = Installed::new(optional);
    let mut objects = futures::stream::pending().boxed();
    loop {
        tokio::select! {
            Some(event) = crds.next() => match installed.absorb(event) {
                None => {}
                Some(Some(version)) => {
                    tracing::info!(crd = optional.crd, version, "CRD is installed");
                    objects = guarded(UnreadableLog::new(optional.kind), objects_of(&client, optional, version), watcher::Config::default()).boxed();
                }
                Some(None) => {
                    objects = futures::stream::pending().boxed();
                    if updates.send((optional.absent)()).await.is_err() {
                        return;
                    }
                }
            },
            Some(event) = objects.next() => match event {
                Ok(event) => {
                    if updates.send((optional.wrap)(event)).await.is_err() {
                        return;
                    }
                }
                Err(e) => tracing::warn!(kind = optional.kind, error = %e, "watch failed; retrying (check that RBAC allows list and watch)"),
            },
            else => return,
        }
    }
}

// Installation state of a CRD, and the version to watch.
struct Installed {
    optional: &'static OptionalKind,
    // `None`: unknown yet. `Some(None)`: not installed.
    version: Option<Option<&'static str>>,
    listed: Option<&'static str>,
}

impl Installed {
    fn new(optional: &'static OptionalKind) -> Self {
        Self { optional, version: None, listed: None }
    }

    // Returns the new state if it changed.
    fn absorb(
        &mut self,
        event: Result<Event<CustomResourceDefinition>, watcher::Error>,
    ) -> Option<Option<&'static str>> {
        let now = match event {
            Ok(Event::Init) => {
                self.listed = None;
                return None;
            }
            Ok(Event::InitApply(crd)) => {
                self.listed = served_version(&crd, self.optional.versions);
                return None;
            }
            Ok(Event::InitDone) => self.listed,
            Ok(Event::Apply(crd)) => served_version(&crd, self.optional.versions),
            Ok(Event::Delete(_)) => None,
            Err(e) => {
                tracing::warn!(crd = self.optional.crd, error = %e, "cannot watch the CRD; retrying (check that RBAC allows list and watch)");
                // Only 403 counts as absent, and only if nothing is known yet: dropping all NodePools because of an
                // outage would dissolve all pools.
                if self.version.is_some() || !is_forbidden(&e) {
                    return None;
                }
                None
            }
        };
        (self.version.replace(now) != Some(now)).then_some(now)
    }
}

fn objects_of(client: &Client, optional: &OptionalKind, version: &str) -> Api<Guarded<DynamicObject>> {
    let resource = ApiResource {
        group: optional.group.to_owned(),
        version: version.to_owned(),
        api_version: format!("{}/{version}", optional.group),
        kind: optional.kind.to_owned(),
        plural: optional.plural.to_owned(),
    };
    Api::all_with(client.clone(), &resource)
}

// `None` also for a CRD that is being deleted or is not established yet: a later event reports that.
fn served_version(crd: &CustomResourceDefinition, versions: &[&'static str]) -> Option<&'static str> {
    let conditions = crd.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    let established = conditions.iter().any(|c| c.type_ == "Established" && c.status == "True");
    if !established || crd.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let served = |version: &str| crd.spec.versions.iter().any(|v| v.served && v.name == version);
    versions.iter().copied().find(|version| served(version))
}

fn is_forbidden(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.is_forbidden())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;

    use tokio::sync::watch;

    use super::*;
    use crate::cluster::{self, Cluster, DecisionSettings};
    use crate::fake_api::{FakeApi, list};

    fn crd(served: &[&str], established: bool) -> CustomResourceDefinition {
        let versions: Vec<_> = ["v1alpha1", "v1beta1", "v1beta2"]
            .map(|v| serde_json::json!({"name": v, "served": served.contains(&v), "storage": v == "v1beta1"}))
            .into();
        let conditions =
            serde_json::json!([{"type": "Established", "status": if established { "True" } else { "False" }}]);
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": NODE_POOLS.crd},
            "spec": {
                "group": "apps.openyurt.io", "scope": "Cluster", "names": {"kind": "NodePool", "plural": "nodepools"}, "versions": versions,
            },
            "status": {"conditions": conditions},
        }))
        .expect("a CRD written in a test")
    }

    fn forbidden() -> watcher::Error {
        let status = kube::core::Status { code: 403, reason: "Forbidden".to_owned(), ..Default::default() };
        watcher::Error::InitialListFailed(kube::Error::Api(status.boxed()))
    }

    #[test]
    fn established_crd_is_reported_once_per_change() {
        let mut installed = Installed::new(&NODE_POOLS);
        assert_eq!(installed.absorb(Ok(Event::Init)), None);
        assert_eq!(installed.absorb(Ok(Event::InitDone)), Some(None));
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta2"], false)))), None);
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta2"], true)))), Some(Some("v1beta2")));
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta2"], true)))), None);
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta1", "v1beta2"], true)))), Some(Some("v1beta1")));
        // A new listing, as after a lost connection, changes nothing.
        assert_eq!(installed.absorb(Ok(Event::Init)), None);
        assert_eq!(installed.absorb(Ok(Event::InitApply(crd(&["v1beta1"], true)))), None);
        assert_eq!(installed.absorb(Ok(Event::InitDone)), None);
        assert_eq!(installed.absorb(Ok(Event::Delete(crd(&["v1beta1"], true)))), Some(None));
    }

    #[test]
    fn forbidden_crd_counts_as_absent_only_if_nothing_is_known() {
        let mut installed = Installed::new(&NODE_POOLS);
        assert_eq!(installed.absorb(Err(watcher::Error::NoResourceVersion)), None);
        assert_eq!(installed.absorb(Err(forbidden())), Some(None));
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta1"], true)))), Some(Some("v1beta1")));
        assert_eq!(installed.absorb(Err(forbidden())), None);
    }

    #[tokio::test]
    async fn unreadable_objects_of_one_node_do_not_affect_other_nodes() {
        let api = FakeApi::serve(|request| {
            Ok(match request {
                "GET /apis/raven.openyurt.io/v1beta1/gatewaynodes" => list(&[
                    r#"{"metadata":{"name":"stolen"},"spec":{},"status":{"peers":[{"nodeName":"y","gateway":"y","lastHandshake":"2026-01-01T00:00:00+99:99"}]}}"#,
                    r#"{"metadata":{"name":"taken","managedFields":[{"manager":"x","time":"9999-12-31T23:59:59Z"}]},"spec":{}}"#,
                    r#"{"metadata":{"name":"good"},"spec":{}}"#,
                ]),
                "GET /api/v1/nodes" => list(&[
                    r#"{"metadata":{"name":"stolen","uid":"1"},"status":{"conditions":[{"type":"X","status":"True","lastHeartbeatTime":"9999-12-31T23:59:59Z"}]}}"#,
                    r#"{"metadata":{"name":"good","uid":"2"}}"#,
                ]),
                _ => list(&[]),
            })
        })
        .await;
        let (updates_tx, updates) = mpsc::channel(16);
        let cluster = Cluster::new(DecisionSettings::default());
        let (snapshots_tx, mut snapshots) = watch::channel(Arc::new(cluster.snapshot()));
        for (_, task) in tasks(&api.client, "kube-system", &updates_tx) {
            tokio::spawn(task);
        }
        tokio::spawn(cluster::run(cluster, updates, snapshots_tx));
        let listed =
            tokio::time::timeout(Duration::from_secs(10), snapshots.wait_for(|snapshot| snapshot.proxies_complete));
        let snapshot = listed.await.expect("everything is listed").expect("the task runs").clone();
        assert_eq!(snapshot.inputs().gateway_nodes, BTreeSet::from(["good".into()]));
        assert_eq!(snapshot.nodes().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["good"]);
        assert_eq!(snapshot.node_uids(), BTreeMap::from([("good".to_owned(), "2".to_owned())]));
    }
}
