//! What the API server holds, followed by watches and kept as checked facts.
//!
//! Each `follow_*` function is a task that sends [`Update`]s; [`World`] absorbs them (one task owns it) and says whether anything changed
//! that a decision could depend on. A Node's heartbeat does not.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::DynamicObject;
use kube::discovery::ApiResource;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use raven_api::pool::{NodePoolSpec, NodePoolStatus};
use raven_api::proxy::LABEL_GATEWAY_TYPE;
use raven_api::{Gateway, GatewayNode};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::config::CONFIG_MAP;
use crate::gateway::inputs::parse_prefix;
use crate::gateway::links::{Doubts, LinkFacts};
use crate::gateway::{BalancerFacts, BlockFacts, GatewayFacts, GatewayName, Inputs, NodeFacts, NodeName, PoolFacts, Switches};

/// A kind of somebody else's, whose CRD may be absent, come and go.
#[derive(Debug)]
pub struct Optional {
    crd: &'static str,
    group: &'static str,
    // In order of preference.
    versions: &'static [&'static str],
    kind: &'static str,
    plural: &'static str,
    wrap: fn(Event<DynamicObject>) -> Update,
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
    Node(Event<Node>),
    /// About NodePools.
    Pool(Event<DynamicObject>),
    /// The CRD of NodePools is not installed.
    NoPools,
    /// About Calico's BlockAffinities.
    Block(Event<DynamicObject>),
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
    Link(Event<DynamicObject>),
    /// They cannot be read: nobody is known to be cut off.
    NoLinks,
    /// About ConfigMap `raven-cfg`.
    Switches(Event<ConfigMap>),
    /// The ConfigMap cannot be read: its defaults hold until it can.
    NoSwitches,
}

/// Follows all Gateways.
pub async fn follow_gateways(client: Client, updates: mpsc::Sender<Update>) {
    follow(Api::<Gateway>::all(client), watcher::Config::default(), &updates, Update::Gateway, None).await;
}

/// Follows all Nodes.
pub async fn follow_nodes(client: Client, updates: mpsc::Sender<Update>) {
    follow(Api::<Node>::all(client), watcher::Config::default(), &updates, Update::Node, None).await;
}

/// Follows our Services of type LoadBalancer: their addresses are what others dial.
pub async fn follow_balancers(client: Client, namespace: String, updates: mpsc::Sender<Update>) {
    let ours = watcher::Config::default().labels(LABEL_GATEWAY_TYPE);
    follow(Api::<Service>::namespaced(client, &namespace), ours, &updates, Update::Balancer, Some(|| Update::NoBalancers)).await;
}

/// Follows what gateway nodes say of their connections.
pub async fn follow_links(client: Client, updates: mpsc::Sender<Update>) {
    let api = Api::<DynamicObject>::all_with(client, &ApiResource::erase::<GatewayNode>(&()));
    follow(api, watcher::Config::default(), &updates, Update::Link, Some(|| Update::NoLinks)).await;
}

/// Follows the one ConfigMap with the switches.
pub async fn follow_switches(client: Client, namespace: String, updates: mpsc::Sender<Update>) {
    let only = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    follow(Api::<ConfigMap>::namespaced(client, &namespace), only, &updates, Update::Switches, Some(|| Update::NoSwitches)).await;
}

/// Follows the addresses of the API server.
pub async fn follow_api_server(client: Client, updates: mpsc::Sender<Update>) {
    let (namespace, name) = API_SERVER_SLICE;
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let api = Api::<EndpointSlice>::namespaced(client, namespace);
    follow(api, only, &updates, Update::ApiServer, Some(|| Update::NoApiServer)).await;
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
    follow(api, watcher::Config::default(), &updates, Update::Services, Some(|| Update::NoServices)).await;
}

async fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    updates: &mpsc::Sender<Update>,
    wrap: fn(Event<K>) -> Update,
    failed: Option<fn() -> Update>,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut events = pin!(watcher(api, config).default_backoff());
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
                    objects = watcher(objects_of(&client, what, version), watcher::Config::default()).default_backoff().boxed();
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

fn objects_of(client: &Client, what: &Optional, version: &str) -> Api<DynamicObject> {
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

// Facts of one kind, by name; a listing in progress replaces them in one step when it is complete.
#[derive(Debug)]
struct Cache<K, V> {
    facts: BTreeMap<K, Arc<V>>,
    listing: BTreeMap<K, Arc<V>>,
    complete: bool,
}

impl<K: Ord, V: PartialEq> Cache<K, V> {
    fn new() -> Self {
        Self { facts: BTreeMap::new(), listing: BTreeMap::new(), complete: false }
    }

    // `parse` gives no facts for an object that does not count (any more).
    fn absorb<T>(&mut self, event: Event<T>, parse: impl Fn(T) -> (K, Option<V>)) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply(object) => {
                let (key, facts) = parse(object);
                facts.map(|facts| self.listing.insert(key, Arc::new(facts)));
                false
            }
            Event::InitDone => {
                let listing = std::mem::take(&mut self.listing);
                let changed = !self.complete || listing != self.facts;
                self.facts = listing;
                self.complete = true;
                changed
            }
            Event::Apply(object) => {
                let (key, facts) = parse(object);
                self.put(key, facts)
            }
            Event::Delete(object) => self.facts.remove(&parse(object).0).is_some(),
        }
    }

    fn put(&mut self, key: K, facts: Option<V>) -> bool {
        match facts {
            Some(facts) if self.facts.get(&key).is_some_and(|old| **old == facts) => false,
            Some(facts) => {
                self.facts.insert(key, Arc::new(facts));
                true
            }
            None => self.facts.remove(&key).is_some(),
        }
    }

    // Complete with nothing, unless it is complete already.
    fn begin(&mut self) -> bool {
        !self.complete && self.reset()
    }

    fn reset(&mut self) -> bool {
        let changed = !self.complete || !self.facts.is_empty();
        *self = Self { complete: true, ..Self::new() };
        changed
    }
}

/// All facts that are known.
#[derive(Debug)]
pub struct World {
    gateways: Cache<GatewayName, GatewayFacts>,
    nodes: Cache<NodeName, NodeFacts>,
    pools: Cache<String, PoolFacts>,
    switches: Cache<String, Switches>,
    blocks: Cache<String, BlockFacts>,
    balancers: Cache<String, BalancerFacts>,
    links: Cache<NodeName, LinkFacts>,
    doubts: Doubts,
    services: Cache<String, Vec<IpNet>>,
    api_servers: Cache<String, Vec<IpAddr>>,
    settings: Settings,
}

/// What the command line says about decisions.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The three pool rules make Gateways.
    pub rules: bool,
    /// Ranges of Service addresses, besides those that the API server tells.
    pub services: Vec<IpNet>,
}

// === impl World ===

impl World {
    /// Nothing known yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            gateways: Cache::new(),
            nodes: Cache::new(),
            pools: Cache::new(),
            switches: Cache::new(),
            blocks: Cache::new(),
            balancers: Cache::new(),
            links: Cache::new(),
            doubts: Doubts::default(),
            services: Cache::new(),
            api_servers: Cache::new(),
            settings,
        }
    }

    /// Everything has been listed once: only then a decision means anything.
    pub fn complete(&self) -> bool {
        let Self { gateways, nodes, pools, switches, blocks, balancers, links, services, api_servers, doubts: _, settings: _ } = self;
        let own = gateways.complete && nodes.complete && switches.complete;
        own && links.complete && pools.complete && blocks.complete && balancers.complete && services.complete && api_servers.complete
    }

    /// Takes an update in. True if something changed that a decision could depend on.
    pub fn absorb(&mut self, update: Update) -> bool {
        match update {
            Update::Gateway(Event::Apply(gateway)) => self.absorb_gateway(gateway),
            Update::Gateway(event) => self.gateways.absorb(event, parse_gateway),
            Update::Node(event) => self.nodes.absorb(event, |node| (node.name_any().as_str().into(), NodeFacts::parse(&node))),
            Update::Pool(event) => self.pools.absorb(event, parse_pool),
            Update::NoPools => self.pools.reset(),
            Update::Block(event) => {
                self.blocks.absorb(event, |block| (block.name_any(), block.data.get("spec").and_then(BlockFacts::parse)))
            }
            Update::NoBlocks => self.blocks.reset(),
            Update::Services(event) => self.services.absorb(event, parse_services),
            Update::ApiServer(event) => self.api_servers.absorb(event, parse_api_server),
            // What was known stays known while it cannot be read: a guard is not taken down for a hiccup.
            Update::Balancer(event) => self.balancers.absorb(event, |service| (service.name_any(), BalancerFacts::parse(&service))),
            Update::NoBalancers => self.balancers.begin(),
            Update::Link(event) => {
                let before = self.links.facts.clone();
                let changed = self.links.absorb(event, |node| (node.name_any().as_str().into(), LinkFacts::parse(&node)));
                if changed {
                    self.doubts.note(&before, &self.links.facts, Instant::now());
                }
                changed
            }
            Update::NoLinks => self.links.reset(),
            Update::NoServices => self.services.begin(),
            Update::NoApiServer => self.api_servers.begin(),
            Update::Switches(event) => {
                self.switches.absorb(event, |map| (map.name_any(), Some(Switches::parse(&map.data.unwrap_or_default()))))
            }
            Update::NoSwitches => self.switches.begin(),
        }
    }

    /// Takes in a Gateway as a write returned it. The watch will say the same a moment later; until then an election that
    /// comes in between must already know who was elected.
    pub fn absorb_gateway(&mut self, gateway: Gateway) -> bool {
        let (name, facts) = parse_gateway(gateway);
        if let (Some(known), Some(facts)) = (self.gateways.facts.get(&name), &facts)
            && is_older(&facts.resource, &known.resource)
        {
            return false;
        }
        self.gateways.put(name, facts)
    }

    /// What to decide on.
    pub fn inputs(&self) -> Inputs {
        Inputs {
            gateways: self.gateways.facts.clone(),
            nodes: self.nodes.facts.clone(),
            pools: self.pools.facts.clone(),
            switches: self.switches.facts.values().next().map(|s| **s).unwrap_or_default(),
            blocks: self.blocks.facts.clone(),
            balancers: self.balancers.facts.values().map(|facts| (**facts).clone()).collect(),
            links: self.doubts.merge(self.links.facts.clone(), Instant::now()),
            services: self.services.facts.values().flat_map(|list| list.iter()).chain(&self.settings.services).copied().collect(),
            api_servers: self.api_servers.facts.values().flat_map(|list| list.iter()).copied().collect(),
            rules: self.settings.rules,
        }
    }
}

fn parse_gateway(mut gateway: Gateway) -> (GatewayName, Option<GatewayFacts>) {
    gateway.metadata.managed_fields = None;
    (gateway.name_any().as_str().into(), GatewayFacts::parse(gateway))
}

fn parse_pool(pool: DynamicObject) -> (String, Option<PoolFacts>) {
    let name = pool.name_any();
    let part = |key: &str| pool.data.get(key).cloned().unwrap_or_default();
    let spec = serde_json::from_value::<NodePoolSpec>(part("spec"))
        .inspect_err(|e| tracing::warn!(pool = %name, error = %e, "NodePool spec is not understood: taken for an edge pool"))
        .unwrap_or_default();
    // Without a status yet: nodes are known by their labels.
    let status = serde_json::from_value::<NodePoolStatus>(part("status")).ok();
    let facts = PoolFacts::new(&name, &spec, status.as_ref());
    (name, Some(facts))
}

fn parse_services(range: ServiceCIDR) -> (String, Option<Vec<IpNet>>) {
    let cidrs = range.spec.as_ref().and_then(|s| s.cidrs.clone()).unwrap_or_default();
    (range.name_any(), Some(cidrs.iter().filter_map(|text| parse_prefix(text).ok()).collect()))
}

fn parse_api_server(slice: EndpointSlice) -> (String, Option<Vec<IpAddr>>) {
    let addresses = slice.endpoints.iter().flat_map(|e| &e.addresses).filter_map(|text| text.parse().ok());
    (slice.name_any(), Some(addresses.collect()))
}

fn is_older(gateway: &Gateway, known: &Gateway) -> bool {
    let version = |g: &Gateway| g.metadata.resource_version.as_deref().and_then(|v| v.parse::<u64>().ok());
    gateway.metadata.uid == known.metadata.uid && version(gateway) < version(known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use raven_api::GatewaySpec;

    fn gateway(name: &str, version: &str) -> Gateway {
        let metadata = ObjectMeta { name: Some(name.into()), resource_version: Some(version.into()), ..Default::default() };
        Gateway { metadata, spec: GatewaySpec::default(), status: None }
    }

    #[test]
    fn a_watch_event_older_than_our_own_write_is_ignored() {
        let mut world = World::new(Settings { rules: true, ..Default::default() });
        assert!(world.absorb(Update::Gateway(Event::Apply(gateway("a", "5")))));
        assert!(world.absorb_gateway(gateway("a", "10")));
        assert!(!world.absorb(Update::Gateway(Event::Apply(gateway("a", "7")))));
        assert!(world.absorb(Update::Gateway(Event::Apply(gateway("a", "11")))));
    }

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

    #[test]
    fn a_listing_replaces_what_was_known_in_one_step() {
        let mut world = World::new(Settings { rules: true, ..Default::default() });
        world.absorb(Update::Gateway(Event::Apply(gateway("gone", "1"))));
        assert!(!world.absorb(Update::Gateway(Event::Init)));
        assert!(!world.absorb(Update::Gateway(Event::InitApply(gateway("new", "2")))));
        assert!(world.inputs().gateways.contains_key(&"gone".into()));
        assert!(world.absorb(Update::Gateway(Event::InitDone)));
        assert_eq!(world.inputs().gateways.keys().map(GatewayName::as_str).collect::<Vec<_>>(), ["new"]);
    }

    #[test]
    fn a_heartbeat_is_no_change() {
        let mut world = World::new(Settings { rules: true, ..Default::default() });
        let mut node = Node { metadata: ObjectMeta { name: Some("n".into()), ..Default::default() }, ..Default::default() };
        assert!(world.absorb(Update::Node(Event::Apply(node.clone()))));
        node.metadata.resource_version = Some("77".into());
        assert!(!world.absorb(Update::Node(Event::Apply(node))));
    }

    #[test]
    fn complete_only_when_everything_was_listed() {
        let mut world = World::new(Settings { rules: true, ..Default::default() });
        world.absorb(Update::Gateway(Event::InitDone));
        world.absorb(Update::Node(Event::InitDone));
        world.absorb(Update::NoPools);
        for other in [Update::NoBlocks, Update::NoBalancers, Update::NoLinks, Update::NoServices, Update::NoApiServer, Update::NoSwitches] {
            assert!(!world.complete());
            world.absorb(other);
        }
        assert!(world.complete());
    }

    #[test]
    fn a_guard_stays_up_while_it_cannot_be_read() {
        let mut world = World::new(Settings { rules: true, services: vec!["10.97.0.0/16".parse().expect("a prefix")] });
        let range = serde_json::from_value(
            serde_json::json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/112"]}}),
        );
        assert!(world.absorb(Update::Services(Event::Apply(range.expect("a ServiceCIDR")))));
        world.absorb(Update::Services(Event::InitDone));
        let known = |world: &World| world.inputs().services.iter().map(ToString::to_string).collect::<Vec<_>>();
        world.absorb(Update::Services(Event::Init));
        assert!(!world.absorb(Update::NoServices));
        assert_eq!(known(&world), ["10.97.0.0/16"]);
    }
}
