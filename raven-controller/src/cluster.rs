//! State of the cluster, maintained from watches and shared by both halves of the controller.
//!
//! [`Cluster`] absorbs [`Update`]s and stores validated facts. [`run`] is the task that owns it and publishes a
//! [`Snapshot`] after each change. An update that changes no fact, such as a Node's heartbeat, publishes nothing and
//! therefore wakes no consumer.

mod cache;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use raven_api::gateway_node::{GatewayNode, GatewayNodeSpec, GatewayNodeStatus, ProxyStatus};
use raven_api::guarded::Unreadable;
use raven_api::pool::{NodePoolSpec, NodePoolStatus};
use raven_api::{Gateway, Guarded};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;

use self::cache::{Cache, Facts};
use crate::gateway::agents::{self, Absences};
use crate::gateway::facts::{
    AgentFacts, BalancerFacts, BlockFacts, GatewayFacts, GatewayName, LinkFacts, LinkReports, NodeFacts, NodeName,
    PoolFacts, PublishedKey, Switches, UnreadableGateway, parse_prefix,
};
use crate::gateway::inputs::Inputs;
use crate::gateway::links::Quarantine;
use crate::gateway::ready::ready;

// Updates that are processed before a snapshot is published.
const BATCH: usize = 1024;

/// An event of a watch, or a result of the controller's own writes.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all updates are Nodes, the largest variant; boxes would cost more than they save"
)]
pub(crate) enum Update {
    /// Event of the watch of Gateways.
    Gateway(Event<Guarded<Gateway>>),
    /// Gateways as returned by the controller's own writes; the sender is notified once they are in
    /// the published snapshot.
    Written(Vec<Gateway>, oneshot::Sender<()>),
    /// Event of the watch of Nodes.
    Node(Event<Guarded<Node>>),
    /// Event of the watch of the agents' Pods.
    Agent(Event<Guarded<Pod>>),
    /// Pods cannot be listed: every node counts as one with an agent.
    AgentsUnavailable,
    /// Event of the watch of GatewayNodes.
    GatewayNode(Event<ObservedGatewayNode>),
    /// GatewayNodes cannot be listed: no node counts as cut off.
    GatewayNodesUnavailable,
    /// Event of the watch of NodePools.
    Pool(Event<Guarded<DynamicObject>>),
    /// The CRD of NodePools is not installed.
    PoolsAbsent,
    /// Event of the watch of Calico's BlockAffinities.
    Block(Event<Guarded<DynamicObject>>),
    /// Calico's CRD is not installed.
    BlocksAbsent,
    /// Event of the watch of ServiceCIDRs, the ranges of Service addresses.
    ServiceCidr(Event<ServiceCIDR>),
    /// The API server does not provide ranges of Service addresses.
    ServiceCidrsUnavailable,
    /// Event of the watch of the API server's addresses.
    ApiServer(Event<EndpointSlice>),
    /// Addresses of the API server cannot be listed.
    ApiServerUnavailable,
    /// Event of the watch of Raven's Services of type LoadBalancer.
    Balancer(Event<Service>),
    /// Services of type LoadBalancer cannot be listed.
    BalancersUnavailable,
    /// Event of the watch of the L7 half's internal Service.
    InternalService(Event<Service>),
    /// Event of the watch of ConfigMap `raven-cfg`.
    Switches(Event<ConfigMap>),
    /// ConfigMap `raven-cfg` cannot be read: the defaults apply.
    SwitchesUnavailable,
}

/// A GatewayNode in two representations. The link reports are read leniently, everything else only if the complete
/// object is readable.
#[derive(Clone, Debug)]
pub(crate) struct ObservedGatewayNode {
    /// Name of the object and of its node.
    pub(crate) name: NodeName,
    /// Reports about connections.
    pub(crate) links: Option<LinkFacts>,
    /// What others need of the object; `None` if the object is unreadable.
    pub(crate) published: Option<Published>,
}

/// What other nodes need to know of a gateway node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Published {
    /// Its WireGuard public key.
    pub(crate) key: Option<PublishedKey>,
    /// State of its proxy.
    pub(crate) proxy: Option<ProxyStatus>,
}

impl ObservedGatewayNode {
    /// Extracts the facts of a GatewayNode. The second value is the typed object, or the reason why it is unreadable.
    pub(crate) fn parse(object: Guarded<DynamicObject>) -> (Self, Guarded<GatewayNode>) {
        let name = object.name_any().as_str().into();
        let links = object.0.as_ref().ok().and_then(LinkFacts::parse);
        let typed = typed_gateway_node(object);
        let published = typed.0.as_ref().ok().map(|node| Published {
            key: PublishedKey::of(node),
            proxy: node.status.as_ref().and_then(|status| status.proxy.clone()),
        });
        (Self { name, links, published }, typed)
    }
}

fn typed_gateway_node(object: Guarded<DynamicObject>) -> Guarded<GatewayNode> {
    let DynamicObject { metadata, mut data, .. } = match object.0 {
        Ok(object) => object,
        Err(unreadable) => return Guarded(Err(unreadable)),
    };
    let spec = serde_json::from_value::<GatewayNodeSpec>(data["spec"].take());
    let status = serde_json::from_value::<Option<GatewayNodeStatus>>(data["status"].take());
    Guarded(match spec.and_then(|spec| Ok((spec, status?))) {
        Ok((spec, status)) => Ok(GatewayNode { metadata, spec, status }),
        Err(e) => Err(Unreadable { error: e.to_string(), metadata }),
    })
}

/// Settings of the command line that affect decisions.
#[derive(Clone, Debug)]
pub(crate) struct DecisionSettings {
    /// The three pool rules create Gateways.
    pub(crate) rules: bool,
    /// Time after which a node without a Ready agent is replaced.
    pub(crate) agent_timeout: Duration,
    /// Ranges of Service addresses, in addition to those of the API server.
    pub(crate) service_cidrs: Vec<IpNet>,
}

impl Default for DecisionSettings {
    fn default() -> Self {
        Self { rules: false, agent_timeout: agents::TIMEOUT, service_cidrs: Vec::new() }
    }
}

/// Facts of the cluster, maintained from updates.
#[derive(Debug)]
pub(crate) struct Cluster {
    gateways: Cache<GatewayName, GatewayFacts>,
    unreadable: Cache<GatewayName, UnreadableGateway>,
    nodes: Cache<NodeName, NodeFacts>,
    agents: Cache<String, AgentFacts>,
    absences: Absences,
    pools: Cache<String, PoolFacts>,
    switches: Cache<String, Switches>,
    blocks: Cache<String, BlockFacts>,
    balancers: Cache<String, BalancerFacts>,
    links: Cache<NodeName, LinkFacts>,
    published: Cache<NodeName, Published>,
    quarantine: Quarantine,
    internal_service: Cache<String, Vec<IpAddr>>,
    service_cidrs: Cache<String, Vec<IpNet>>,
    api_servers: Cache<String, Vec<IpAddr>>,
    settings: DecisionSettings,
    revision: u64,
}

impl Cluster {
    /// Creates an empty cluster.
    pub(crate) fn new(settings: DecisionSettings) -> Self {
        Self {
            gateways: Cache::new(),
            unreadable: Cache::new(),
            nodes: Cache::new(),
            agents: Cache::new(),
            absences: Absences::new(settings.agent_timeout),
            pools: Cache::new(),
            switches: Cache::new(),
            blocks: Cache::new(),
            balancers: Cache::new(),
            links: Cache::new(),
            published: Cache::new(),
            quarantine: Quarantine::default(),
            internal_service: Cache::new(),
            service_cidrs: Cache::new(),
            api_servers: Cache::new(),
            settings,
            revision: 0,
        }
    }

    /// Absorbs an update. Returns true if a fact changed.
    pub(crate) fn absorb(&mut self, update: Update) -> bool {
        let changed = match update {
            // Own writes do not advance the revision: the reconciler has them already.
            Update::Written(gateways, _) => {
                let mut changed = false;
                for gateway in gateways {
                    changed |= self.absorb_gateway(gateway);
                }
                return changed;
            }
            Update::Gateway(event) => self.absorb_gateway_event(event),
            Update::Node(event) => self.nodes.absorb(event, |node| parse_guarded(node, |node| NodeFacts::parse(&node))),
            Update::Agent(event) => self.agents.absorb(event, |pod| parse_guarded(pod, |pod| AgentFacts::parse(&pod))),
            Update::AgentsUnavailable => self.agents.clear(),
            Update::GatewayNode(event) => self.absorb_gateway_node(&event),
            Update::GatewayNodesUnavailable => self.links.clear(),
            Update::Pool(event) => self.pools.absorb(event, |pool| parse_guarded(pool, |pool| Some(parse_pool(&pool)))),
            Update::PoolsAbsent => self.pools.clear(),
            Update::Block(event) => self.blocks.absorb(event, |block| {
                parse_guarded(block, |block| block.data.get("spec").and_then(BlockFacts::parse))
            }),
            Update::BlocksAbsent => self.blocks.clear(),
            // Known facts stay valid while a kind is unavailable: protected prefixes must not become claimable because
            // of an outage.
            Update::ServiceCidr(event) => self.service_cidrs.absorb(event, parse_service_cidr),
            Update::ServiceCidrsUnavailable => self.service_cidrs.assume_complete(),
            Update::ApiServer(event) => self.api_servers.absorb(event, parse_api_server),
            Update::ApiServerUnavailable => self.api_servers.assume_complete(),
            Update::Balancer(event) => {
                self.balancers.absorb(event, |service| (service.name_any(), BalancerFacts::parse(&service)))
            }
            Update::BalancersUnavailable => self.balancers.assume_complete(),
            Update::InternalService(event) => self.internal_service.absorb(event, parse_internal_service),
            Update::Switches(event) => self
                .switches
                .absorb(event, |map| (map.name_any(), Some(Switches::parse(&map.data.unwrap_or_default())))),
            Update::SwitchesUnavailable => self.switches.assume_complete(),
        };
        self.revision += u64::from(changed);
        changed
    }

    // The last known version of an unreadable Gateway stays in use, so that other Gateways cannot claim its nodes and
    // prefixes. Its status stays as it is.
    fn absorb_gateway_event(&mut self, event: Event<Guarded<Gateway>>) -> bool {
        let reported = self.unreadable.absorb(event.clone(), |gateway| {
            (gateway.name_any().as_str().into(), gateway.0.err().map(UnreadableGateway::from))
        });
        let changed = match event {
            Event::Apply(Guarded(Ok(gateway))) => self.absorb_gateway(gateway),
            Event::Apply(Guarded(Err(_))) => false,
            Event::InitApply(Guarded(Err(unreadable))) => {
                self.gateways.keep(&unreadable.metadata.name.unwrap_or_default().as_str().into());
                false
            }
            event => self.gateways.absorb(event, |gateway| parse_guarded(gateway, GatewayFacts::parse)),
        };
        changed || reported
    }

    // A watch event may be older than the result of an own write, and must not undo it: the next election would not see
    // the elected nodes.
    fn absorb_gateway(&mut self, gateway: Gateway) -> bool {
        let (name, facts) = parse_gateway(gateway);
        if let (Some(known), Some(facts)) = (self.gateways.facts.get(&name), &facts)
            && is_older(&facts.resource, &known.resource)
        {
            return false;
        }
        self.gateways.put(name, facts)
    }

    fn absorb_gateway_node(&mut self, event: &Event<ObservedGatewayNode>) -> bool {
        let links_changed = self.links.absorb(event.clone(), |node| (node.name, node.links));
        if links_changed {
            self.quarantine.update(&self.links.facts, Instant::now());
        }
        self.published.absorb(event.clone(), |node| (node.name, node.published)) || links_changed
    }

    /// Updates since when nodes have no Ready agent. Once per batch, because it considers all nodes.
    fn update_absences(&mut self) {
        self.absences.update(self.nodes.facts.keys(), &self.agents.facts, Instant::now());
    }

    /// Returns the present state. Cheap: facts are shared.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let Self {
            gateways,
            nodes,
            pools,
            switches,
            blocks,
            balancers,
            links,
            published,
            internal_service,
            service_cidrs,
            api_servers,
            ..
        } = self;
        let common = gateways.complete && nodes.complete && switches.complete;
        let optional =
            pools.complete && blocks.complete && balancers.complete && service_cidrs.complete && api_servers.complete;
        Snapshot {
            revision: self.revision,
            complete: common && links.complete && optional,
            proxies_complete: gateways.listed
                && nodes.listed
                && switches.listed
                && published.listed
                && internal_service.listed,
            gateways: gateways.facts.clone(),
            unreadable: self.unreadable.facts.clone(),
            nodes: nodes.facts.clone(),
            pools: pools.facts.clone(),
            blocks: blocks.facts.clone(),
            balancers: balancers.facts.clone(),
            links: links.facts.clone(),
            quarantine: self.quarantine.clone(),
            absences: self.absences.clone(),
            published: published.facts.clone(),
            internal_service: internal_service.facts.values().flat_map(|list| list.iter()).copied().collect(),
            service_cidrs: service_cidrs
                .facts
                .values()
                .flat_map(|list| list.iter())
                .chain(&self.settings.service_cidrs)
                .copied()
                .collect(),
            api_servers: api_servers.facts.values().flat_map(|list| list.iter()).copied().collect(),
            switches: switches.facts.values().next().map(|s| **s).unwrap_or_default(),
            rules: self.settings.rules,
        }
    }
}

/// State of the cluster at one point in time.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// Number of changes by watches so far; the controller's own writes do not count.
    pub(crate) revision: u64,
    /// All kinds were listed, or are known to be unavailable: decisions are valid from then on.
    pub(crate) complete: bool,
    /// All kinds that the L7 half needs were listed.
    pub(crate) proxies_complete: bool,
    gateways: Facts<GatewayName, GatewayFacts>,
    unreadable: Facts<GatewayName, UnreadableGateway>,
    nodes: Facts<NodeName, NodeFacts>,
    pools: Facts<String, PoolFacts>,
    blocks: Facts<String, BlockFacts>,
    balancers: Facts<String, BalancerFacts>,
    links: Facts<NodeName, LinkFacts>,
    quarantine: Quarantine,
    absences: Absences,
    published: Facts<NodeName, Published>,
    internal_service: Vec<IpAddr>,
    service_cidrs: Vec<IpNet>,
    api_servers: Vec<IpAddr>,
    switches: Switches,
    rules: bool,
}

impl Snapshot {
    /// Returns the inputs of the decision about Gateways.
    pub(crate) fn inputs(&self) -> Inputs {
        let links = LinkReports::clone(&self.links);
        Inputs {
            gateways: BTreeMap::clone(&self.gateways),
            unreadable: BTreeMap::clone(&self.unreadable),
            nodes: BTreeMap::clone(&self.nodes),
            pools: BTreeMap::clone(&self.pools),
            switches: self.switches,
            blocks: BTreeMap::clone(&self.blocks),
            balancers: self.balancers.values().map(|facts| (**facts).clone()).collect(),
            links: self.quarantine.merge(links, Instant::now()),
            without_agent: self.absences.nodes(Instant::now()),
            gateway_nodes: self.published.keys().cloned().collect(),
            keys: self.published.iter().filter_map(|(name, node)| Some((name.clone(), node.key.clone()?))).collect(),
            ready_proxies: self.ready_proxies(),
            services: self.service_cidrs.iter().copied().collect(),
            api_servers: self.api_servers.iter().copied().collect(),
            rules: self.rules,
        }
    }

    /// Returns all Gateways that are not being deleted.
    pub(crate) fn gateways(&self) -> Vec<Gateway> {
        self.gateways.values().map(|facts| (*facts.resource).clone()).collect()
    }

    /// Returns the nodes of exposed Gateways whose proxy works.
    pub(crate) fn ready_proxies(&self) -> BTreeSet<NodeName> {
        let gateways = self.gateways.values().map(|facts| facts.resource.as_ref());
        let proxies = self.published.iter().filter_map(|(name, node)| Some((name.as_str(), node.proxy.as_ref()?)));
        ready(gateways, proxies).into_iter().map(NodeName::from).collect()
    }

    /// Returns all readable Nodes.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &NodeFacts> {
        self.nodes.values().map(Arc::as_ref)
    }

    /// Returns the UIDs of all readable Nodes, by name.
    pub(crate) fn node_uids(&self) -> BTreeMap<String, String> {
        self.nodes().filter_map(|node| Some((node.name.to_string(), node.uid.clone()?))).collect()
    }

    /// Returns the cluster IPs of the internal Service.
    pub(crate) fn internal_service(&self) -> &[IpAddr] {
        &self.internal_service
    }

    /// True if the L7 half is on.
    pub(crate) fn l7(&self) -> bool {
        self.switches.l7
    }
}

/// Absorbs updates and publishes a snapshot after each batch that changed a fact, and when a node has had no Ready agent
/// for too long. Ends when all senders of updates are dropped.
pub(crate) async fn run(
    mut cluster: Cluster,
    mut updates: mpsc::Receiver<Update>,
    snapshots: watch::Sender<Arc<Snapshot>>,
) {
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        let timeout = cluster.absences.next_timeout(Instant::now());
        let timed_out = tokio::select! {
            received = updates.recv_many(&mut batch, BATCH) => if received == 0 { return } else { false },
            () = sleep_until(timeout.unwrap_or_else(Instant::now).into()), if timeout.is_some() => true,
        };
        cluster.revision += u64::from(timed_out);
        let (mut changed, mut waiting) = (timed_out, Vec::new());
        for update in batch.drain(..) {
            let (update, absorbed) = match update {
                Update::Written(gateways, absorbed) => {
                    let (unused, _) = oneshot::channel();
                    (Update::Written(gateways, unused), Some(absorbed))
                }
                update => (update, None),
            };
            changed |= cluster.absorb(update);
            waiting.extend(absorbed);
        }
        if changed {
            cluster.update_absences();
            snapshots.send_replace(Arc::new(cluster.snapshot()));
        }
        for absorbed in waiting {
            // The writer may have stopped waiting.
            let _ = absorbed.send(());
        }
    }
}

fn parse_gateway(gateway: Gateway) -> (GatewayName, Option<GatewayFacts>) {
    (gateway.name_any().as_str().into(), GatewayFacts::parse(gateway))
}

// An unreadable object yields no facts.
fn parse_guarded<K: Resource, N: for<'a> From<&'a str>, V>(
    object: Guarded<K>,
    parse: impl Fn(K) -> Option<V>,
) -> (N, Option<V>) {
    (object.name_any().as_str().into(), object.0.ok().and_then(parse))
}

fn parse_pool(pool: &DynamicObject) -> PoolFacts {
    let name = pool.name_any();
    let part = |key: &str| pool.data.get(key).cloned().unwrap_or_default();
    let spec = serde_json::from_value::<NodePoolSpec>(part("spec"))
        .inspect_err(
            |e| tracing::warn!(pool = %name, error = %e, "cannot parse NodePool spec; treating it as an edge pool"),
        )
        .unwrap_or_default();
    // Without a status, nodes are assigned by their labels.
    let status = serde_json::from_value::<NodePoolStatus>(part("status")).ok();
    PoolFacts::new(&name, &spec, status.as_ref())
}

fn parse_service_cidr(range: ServiceCIDR) -> (String, Option<Vec<IpNet>>) {
    let cidrs = range.spec.as_ref().and_then(|s| s.cidrs.clone()).unwrap_or_default();
    (range.name_any(), Some(cidrs.iter().filter_map(|text| parse_prefix(text).ok()).collect()))
}

fn parse_api_server(slice: EndpointSlice) -> (String, Option<Vec<IpAddr>>) {
    let addresses = slice.endpoints.iter().flat_map(|e| &e.addresses).filter_map(|text| text.parse().ok());
    (slice.name_any(), Some(addresses.collect()))
}

fn parse_internal_service(service: Service) -> (String, Option<Vec<IpAddr>>) {
    let cluster_ips = service.spec.iter().flat_map(|spec| spec.cluster_ips.iter().flatten());
    let addresses = cluster_ips.filter_map(|ip| ip.parse().ok()).collect();
    (service.name_any(), Some(addresses))
}

fn is_older(gateway: &Gateway, known: &Gateway) -> bool {
    let version = |g: &Gateway| g.metadata.resource_version.as_deref().and_then(|v| v.parse::<u64>().ok());
    gateway.metadata.uid == known.metadata.uid && version(gateway) < version(known)
}

#[cfg(test)]
mod tests;
