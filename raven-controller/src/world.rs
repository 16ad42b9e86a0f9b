//! What is known of the cluster: [`World`] absorbs what the watches say (one task owns it), keeps it as checked facts, and says whether
//! anything changed that a decision could depend on. A Node's heartbeat does not.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use raven_api::pool::{NodePoolSpec, NodePoolStatus};
use raven_api::{Gateway, Guarded};

use crate::gateway::inputs::parse_prefix;
use crate::gateway::links::{Doubts, LinkFacts};
use crate::gateway::{BalancerFacts, BlockFacts, GatewayFacts, GatewayName, Inputs, NodeFacts, NodeName, PoolFacts, Switches};
use crate::watch::Update;

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
            Update::Node(event) => self.nodes.absorb(event, |node| read(node, |node| NodeFacts::parse(&node))),
            Update::Pool(event) => self.pools.absorb(event, |pool| read(pool, |pool| Some(parse_pool(&pool)))),
            Update::NoPools => self.pools.reset(),
            Update::Block(event) => {
                self.blocks.absorb(event, |block| read(block, |block| block.data.get("spec").and_then(BlockFacts::parse)))
            }
            Update::NoBlocks => self.blocks.reset(),
            Update::Services(event) => self.services.absorb(event, parse_services),
            Update::ApiServer(event) => self.api_servers.absorb(event, parse_api_server),
            // What was known stays known while it cannot be read: a guard is not taken down for a hiccup.
            Update::Balancer(event) => self.balancers.absorb(event, |service| (service.name_any(), BalancerFacts::parse(&service))),
            Update::NoBalancers => self.balancers.begin(),
            Update::Link(event) => {
                let changed = self.links.absorb(event, |node| read(node, |node| LinkFacts::parse(&node)));
                if changed {
                    self.doubts.note(&self.links.facts, Instant::now());
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

// One that cannot be read gives no facts.
fn read<K: Resource, N: for<'a> From<&'a str>, V>(object: Guarded<K>, parse: impl Fn(K) -> Option<V>) -> (N, Option<V>) {
    (object.name_any().as_str().into(), object.0.ok().and_then(parse))
}

fn parse_pool(pool: &DynamicObject) -> PoolFacts {
    let name = pool.name_any();
    let part = |key: &str| pool.data.get(key).cloned().unwrap_or_default();
    let spec = serde_json::from_value::<NodePoolSpec>(part("spec"))
        .inspect_err(|e| tracing::warn!(pool = %name, error = %e, "NodePool spec is not understood: taken for an edge pool"))
        .unwrap_or_default();
    // Without a status yet: nodes are known by their labels.
    let status = serde_json::from_value::<NodePoolStatus>(part("status")).ok();
    PoolFacts::new(&name, &spec, status.as_ref())
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
    use k8s_openapi::api::core::v1::Node;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use raven_api::GatewaySpec;

    use super::*;

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
        assert!(world.absorb(Update::Node(Event::Apply(Guarded(Ok(node.clone()))))));
        node.metadata.resource_version = Some("77".into());
        assert!(!world.absorb(Update::Node(Event::Apply(Guarded(Ok(node))))));
    }

    #[test]
    fn a_node_that_cannot_be_read_any_more_counts_as_absent() {
        let mut world = World::new(Settings { rules: true, ..Default::default() });
        let node = |heartbeat: &str| {
            let text = format!(
                r#"{{"metadata":{{"name":"n"}},"status":{{"conditions":[{{"type":"X","status":"True","lastHeartbeatTime":"{heartbeat}"}}]}}}}"#
            );
            serde_json::from_str(&text).expect("never an error")
        };
        assert!(world.absorb(Update::Node(Event::Apply(node("2026-01-01T00:00:00Z")))));
        assert_eq!(world.inputs().nodes.len(), 1);
        assert!(world.absorb(Update::Node(Event::Apply(node("9999-12-31T23:59:59Z")))));
        assert_eq!(world.inputs().nodes.len(), 0);
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
