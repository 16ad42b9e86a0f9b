//! What the API server holds, followed by watches.
//!
//! Each `follow_*` function is a task that sends [`Update`]s; [`World`](crate::world::World) absorbs them.

use std::fmt::Debug;
use std::pin::pin;
use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::DynamicObject;
use kube::discovery::ApiResource;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use raven_api::guarded::{Guarded, Told};
use raven_api::proxy::LABEL_GATEWAY_TYPE;
use raven_api::{Gateway, GatewayNode};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::config::CONFIG_MAP;

/// A kind of somebody else's, whose CRD may be absent, come and go.
#[derive(Debug)]
pub struct Optional {
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
pub const NODE_POOLS: Optional = Optional {
    crd: "nodepools.apps.openyurt.io",
    group: "apps.openyurt.io",
    versions: &["v1beta1", "v1beta2", "v1alpha1"],
    kind: "NodePool",
    plural: "nodepools",
    wrap: Update::Pool,
    absent: || Update::NoPools,
};

/// Blocks of Calico's IPAM: one watch for the whole cluster.
pub const BLOCKS: Optional = Optional {
    crd: "blockaffinities.crd.projectcalico.org",
    group: "crd.projectcalico.org",
    versions: &["v1"],
    kind: "BlockAffinity",
    plural: "blockaffinities",
    wrap: Update::Block,
    absent: || Update::NoBlocks,
};

// The API server tells where it can be reached in this one object.
const API_SERVER_SLICE: (&str, &str) = ("default", "kubernetes");
// ServiceCIDRs come with an upgrade of the API server, which is rare.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// Something that a watch said.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all are Nodes, the largest: a box for each would cost more than it saves")]
pub enum Update {
    /// About Gateways.
    Gateway(Event<Gateway>),
    /// About Nodes.
    Node(Event<Guarded<Node>>),
    /// About NodePools.
    Pool(Event<Guarded<DynamicObject>>),
    /// The CRD of NodePools is not installed.
    NoPools,
    /// About Calico's BlockAffinities.
    Block(Event<Guarded<DynamicObject>>),
    /// Calico is not installed.
    NoBlocks,
    /// About ranges of Service addresses.
    Services(Event<ServiceCIDR>),
    /// They cannot be known from the API server.
    NoServices,
    /// About the API server's addresses.
    ApiServer(Event<EndpointSlice>),
    /// They cannot be known.
    NoApiServer,
    /// About our Services of type LoadBalancer.
    Balancer(Event<Service>),
    /// They cannot be known.
    NoBalancers,
    /// About GatewayNodes.
    Link(Event<Guarded<DynamicObject>>),
    /// They cannot be read: nobody is known to be cut off.
    NoLinks,
    /// About ConfigMap `raven-cfg`.
    Switches(Event<ConfigMap>),
    /// The ConfigMap cannot be read: its defaults hold until it can.
    NoSwitches,
}

/// Follows all Gateways.
pub async fn follow_gateways(client: Client, updates: mpsc::Sender<Update>) {
    follow(events(Api::<Gateway>::all(client), watcher::Config::default()), &updates, Update::Gateway, None).await;
}

/// Follows all Nodes.
pub async fn follow_nodes(client: Client, updates: mpsc::Sender<Update>) {
    follow(guarded("Node", Api::<Guarded<Node>>::all(client), watcher::Config::default()), &updates, Update::Node, None).await;
}

/// Follows our Services of type LoadBalancer: their addresses are what others dial.
pub async fn follow_balancers(client: Client, namespace: String, updates: mpsc::Sender<Update>) {
    let ours = watcher::Config::default().labels(LABEL_GATEWAY_TYPE);
    let api = Api::<Service>::namespaced(client, &namespace);
    follow(events(api, ours), &updates, Update::Balancer, Some(|| Update::NoBalancers)).await;
}

/// Follows what gateway nodes say of their connections.
pub async fn follow_links(client: Client, updates: mpsc::Sender<Update>) {
    let api = Api::<Guarded<DynamicObject>>::all_with(client, &ApiResource::erase::<GatewayNode>(&()));
    follow(guarded("GatewayNode", api, watcher::Config::default()), &updates, Update::Link, Some(|| Update::NoLinks)).await;
}

/// Follows the one ConfigMap with the switches.
pub async fn follow_switches(client: Client, namespace: String, updates: mpsc::Sender<Update>) {
    let only = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let api = Api::<ConfigMap>::namespaced(client, &namespace);
    follow(events(api, only), &updates, Update::Switches, Some(|| Update::NoSwitches)).await;
}

/// Follows the addresses of the API server.
pub async fn follow_api_server(client: Client, updates: mpsc::Sender<Update>) {
    let (namespace, name) = API_SERVER_SLICE;
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let api = Api::<EndpointSlice>::namespaced(client, namespace);
    follow(events(api, only), &updates, Update::ApiServer, Some(|| Update::NoApiServer)).await;
}

/// Follows the ranges of Service addresses, where the API server has them as objects (Kubernetes 1.33 and later); looks again now and then
/// where it has not.
pub async fn follow_services(client: Client, updates: mpsc::Sender<Update>) {
    let mut said = false;
    loop {
        match client.list_api_group_resources("networking.k8s.io/v1").await {
            Ok(list) if list.resources.iter().any(|r| r.name == "servicecidrs") => break,
            Ok(_) if !said => {
                tracing::warn!(
                    "this API server has no ServiceCIDR objects: name the range of Service addresses by --service-cidr, so that no Gateway can claim it"
                );
                said = true;
            }
            Ok(_) => {}
            Err(e) => tracing::warn!(error = %e, "ask the API server whether it has ServiceCIDR objects"),
        }
        if updates.send(Update::NoServices).await.is_err() {
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let api = Api::<ServiceCIDR>::all(client);
    follow(events(api, watcher::Config::default()), &updates, Update::Services, Some(|| Update::NoServices)).await;
}

/// What a watch says of objects that people and controllers write: none of them is unreadable but by a defect, and then nothing is done
/// without it.
pub fn events<K>(api: Api<K>, config: watcher::Config) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(api, config).default_backoff()
}

/// The same of objects that a node writes about itself (its agent, its kubelet, its CNI): one that cannot be read is named in the log,
/// once, and counts as absent.
pub fn guarded<K>(
    kind: &'static str,
    api: Api<Guarded<K>>,
    config: watcher::Config,
) -> impl Stream<Item = watcher::Result<Event<Guarded<K>>>> + Send
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut told = Told::of(kind);
    events(api, config).inspect_ok(move |event| match event {
        Event::Apply(object) | Event::InitApply(object) => {
            if let Some(news) = told.news(object) {
                tracing::warn!("{news}");
            }
        }
        Event::Delete(object) => told.forget(&object.name_any()),
        Event::Init | Event::InitDone => {}
    })
}

async fn follow<K>(
    events: impl Stream<Item = watcher::Result<Event<K>>>,
    updates: &mpsc::Sender<Update>,
    wrap: fn(Event<K>) -> Update,
    failed: Option<fn() -> Update>,
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
                tracing::warn!(kind = %std::any::type_name::<K>(), error = %e, "watch (is the CRD installed, and does RBAC allow it?)");
                refusals += u32::from(is_refusal(&e));
                failed.filter(|_| refusals >= REFUSALS).map(|make| make())
            }
        };
        let Some(update) = update else { continue };
        if updates.send(update).await.is_err() {
            return;
        }
    }
}

/// An API server that is starting, or whose RBAC is not there yet, refuses for a moment: only one that goes on refusing means it, and
/// decisions without what it did not tell would be wrong ones.
const REFUSALS: u32 = 3;

fn is_refusal(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    matches!(error, InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status)) | WatchFailed(kube::Error::Api(status))
        if matches!(status.code, 403 | 404))
}

/// Follows all objects of a kind, as long as its CRD is installed; notices when it comes, goes, or serves another version.
pub async fn follow_optional(client: Client, what: &'static Optional, updates: mpsc::Sender<Update>) {
    let only = watcher::Config::default().fields(&format!("metadata.name={}", what.crd));
    let mut crds = pin!(watcher(Api::<CustomResourceDefinition>::all(client.clone()), only).default_backoff());
    let mut installed = Installed::of(what);
    let mut objects = futures::stream::pending().boxed();
    loop {
        tokio::select! {
            Some(event) = crds.next() => match installed.absorb(event) {
                None => {}
                Some(Some(version)) => {
                    tracing::info!(crd = what.crd, %version, "installed");
                    objects = guarded(what.kind, objects_of(&client, what, version), watcher::Config::default()).boxed();
                }
                Some(None) => {
                    objects = futures::stream::pending().boxed();
                    if updates.send((what.absent)()).await.is_err() {
                        return;
                    }
                }
            },
            Some(event) = objects.next() => match event {
                Ok(event) => {
                    if updates.send((what.wrap)(event)).await.is_err() {
                        return;
                    }
                }
                Err(e) => tracing::warn!(kind = what.kind, error = %e, "watch (does RBAC allow it?)"),
            },
            else => return,
        }
    }
}

// Whether the CRD is there, and which version of it to read.
struct Installed {
    what: &'static Optional,
    // None: not known yet.
    version: Option<Option<&'static str>>,
    listed: Option<&'static str>,
}

impl Installed {
    fn of(what: &'static Optional) -> Self {
        Self { what, version: None, listed: None }
    }

    // Some if what holds from now on is not what held before.
    fn absorb(&mut self, event: Result<Event<CustomResourceDefinition>, watcher::Error>) -> Option<Option<&'static str>> {
        let now = match event {
            Ok(Event::Init) => {
                self.listed = None;
                return None;
            }
            Ok(Event::InitApply(crd)) => {
                self.listed = served_version(&crd, self.what.versions);
                return None;
            }
            Ok(Event::InitDone) => self.listed,
            Ok(Event::Apply(crd)) => served_version(&crd, self.what.versions),
            Ok(Event::Delete(_)) => None,
            Err(e) => {
                tracing::warn!(error = %e, "watch the CRD {} (does RBAC allow it?)", self.what.crd);
                // Only a plain 'no' counts, and only in the beginning: to forget all NodePools for a hiccup would tear all pools down.
                if self.version.is_some() || !is_forbidden(&e) {
                    return None;
                }
                None
            }
        };
        (self.version.replace(now) != Some(now)).then_some(now)
    }
}

fn objects_of(client: &Client, what: &Optional, version: &str) -> Api<Guarded<DynamicObject>> {
    let resource = ApiResource {
        group: what.group.to_owned(),
        version: version.to_owned(),
        api_version: format!("{}/{version}", what.group),
        kind: what.kind.to_owned(),
        plural: what.plural.to_owned(),
    };
    Api::all_with(client.clone(), &resource)
}

// None also for a CRD that is about to go, or that the API server has not taken up yet: it says so by another event.
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
    use super::*;

    fn crd(served: &[&str], established: bool) -> CustomResourceDefinition {
        let versions: Vec<_> = ["v1alpha1", "v1beta1", "v1beta2"]
            .map(|v| serde_json::json!({"name": v, "served": served.contains(&v), "storage": v == "v1beta1"}))
            .into();
        let conditions = serde_json::json!([{"type": "Established", "status": if established { "True" } else { "False" }}]);
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
    fn node_pools_are_installed_once_their_crd_is_established_and_each_change_is_said_once() {
        let mut installed = Installed::of(&NODE_POOLS);
        assert_eq!(installed.absorb(Ok(Event::Init)), None);
        assert_eq!(installed.absorb(Ok(Event::InitDone)), Some(None));
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta2"], false)))), None);
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta2"], true)))), Some(Some("v1beta2")));
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta2"], true)))), None);
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta1", "v1beta2"], true)))), Some(Some("v1beta1")));
        // A listing in between, as after a lost connection, says nothing new.
        assert_eq!(installed.absorb(Ok(Event::Init)), None);
        assert_eq!(installed.absorb(Ok(Event::InitApply(crd(&["v1beta1"], true)))), None);
        assert_eq!(installed.absorb(Ok(Event::InitDone)), None);
        assert_eq!(installed.absorb(Ok(Event::Delete(crd(&["v1beta1"], true)))), Some(None));
    }

    #[test]
    fn without_the_right_to_look_there_are_no_node_pools_but_known_ones_are_not_forgotten() {
        let mut installed = Installed::of(&NODE_POOLS);
        assert_eq!(installed.absorb(Err(watcher::Error::NoResourceVersion)), None);
        assert_eq!(installed.absorb(Err(forbidden())), Some(None));
        assert_eq!(installed.absorb(Ok(Event::Apply(crd(&["v1beta1"], true)))), Some(Some("v1beta1")));
        assert_eq!(installed.absorb(Err(forbidden())), None);
    }
}
