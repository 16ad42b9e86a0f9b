//! Brings the kernel to the planned state, in two calls per run: [`Reconciler::observe`] reads what the plan depends
//! on, [`Reconciler::apply`] runs the drivers. A failed step never stops the others; it is reported and retried in
//! the next run.

mod handshakes;
mod interception;
mod preshared;
mod programs;
mod report;
mod steps;

use std::{
    collections::BTreeMap,
    net::{IpAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use tokio::time::{Instant, timeout};

pub use self::report::{Error, Report};
use self::{
    handshakes::{FIRST_RETRY, Handshakes},
    preshared::PresharedSource,
    report::Outcome,
};
use crate::{
    bpf::{self, Bpf, Hook, probe::Release},
    config::{Engine, TcAttach, Tier},
    conntrack,
    diff::diff,
    link::{self, Links, Neighbours, Uplink, Uplinks},
    names,
    netfilter::{self, Ensured, Sources, Without},
    plan::{Me, Plan},
    state::{Abilities, Change, Indexes, Role, State},
    surroundings,
    topology::{PresharedKey, Topology},
    tunnel::{self, Backend, PrivateKey, Tunnel},
};

/// Time for which an overflow of a neighbour table is reported.
const OVERFLOW_SHOWN: Duration = Duration::from_secs(600);
/// Shortest period of the check of the surroundings while nothing changes.
const SURROUNDINGS_PERIOD: Duration = Duration::from_secs(25);
/// The period is at least this many times as long as the check took, which depends on the node's firewall.
const SURROUNDINGS_SHARE: u32 = 100;

/// Time limit of the check of connections.
const CONNTRACK_LIMIT: Duration = Duration::from_secs(10);

/// Time until a run after one that found no uplink: a link that comes back may get its routes later.
const UPLINK_RETRY: Duration = Duration::from_secs(2);

/// Time until a run after one that found no working WireGuard, such as an engine that is about to start.
const ENGINE_RETRY: Duration = Duration::from_secs(2);

/// Settings that stay the same for the life of the process.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Address by which the uplink is found, if the Node's InternalIP is on no device.
    pub node_ip: Option<IpAddr>,
    /// Prefixes that must never enter the tunnel.
    pub protected: Vec<IpNet>,
    /// The bits of kube-proxy's mark on packets that it masquerades.
    pub masquerade_mark: u32,
    /// Largest packet in the tunnel in bytes, if it is limited.
    pub tunnel_mtu: Option<u32>,
    /// Release of the running kernel.
    pub release: Release,
    /// How TC programs are attached.
    pub tc_attach: TcAttach,
    /// How a gateway node receives overlay packets.
    pub tier: Tier,
    /// Which process runs WireGuard if the kernel has none.
    pub wireguard_engine: Engine,
    /// An eBPF object that replaces the built-in one.
    pub ebpf_object: Option<PathBuf>,
    /// File of the cluster's preshared key.
    pub preshared_key_file: PathBuf,
    /// The preshared key that applies if that file does not exist.
    pub preshared_key: Option<PresharedKey>,
}

impl Settings {
    /// True for TCX, false for clsact.
    fn tcx(&self) -> bool {
        match self.tc_attach {
            TcAttach::Auto => self.release.has_tcx(),
            TcAttach::Tcx => true,
            TcAttach::Clsact => false,
        }
    }
}

/// Owns the drivers. One task owns it.
pub struct Reconciler {
    settings: Settings,
    links: Links,
    uplinks: Uplinks,
    bpf: Bpf,
    key: PrivateKey,
    /// Proof that this node has the key; made once, because every proof is different.
    key_proof: String,
    preshared: PresharedSource,
    tunnel: Option<Tunnel>,
    handshakes: Handshakes,
    restored: u64,
    /// The proxy's listener for intercepted connections.
    listener: Option<TcpListener>,
    /// The last check of the surroundings. netfilter can have many rules, so they are not read in every run.
    surroundings: Option<Checked>,
    /// Parts of the nft table that this kernel cannot have.
    without: Without,
    /// Connections may have a wrong source: what determines it has changed, by this agent or before its start.
    unchecked_connections: bool,
}

/// A check of the surroundings.
struct Checked {
    /// Time of the next one, if nothing changes.
    next: Instant,
    /// What stops packets.
    found: Vec<String>,
    /// The neighbour tables; `None` if they could not be read.
    neighbours: Option<Neighbours>,
    /// Families whose neighbour table has overflowed, with the time of the last overflow.
    overflowed: BTreeMap<&'static str, Instant>,
}

/// What a run reads before it plans.
pub struct Observed {
    /// The plan's view of this node.
    pub me: Me,
    uplink: Option<Uplink>,
    in_pool: bool,
    preshared_changed: bool,
    outcome: Outcome,
}

// === impl Reconciler ===

impl Reconciler {
    /// Loads the programs and takes over the pins of an earlier agent.
    pub fn new(
        settings: Settings,
        links: Links,
        key: PrivateKey,
        listener: Option<TcpListener>,
    ) -> Result<Self, bpf::Error> {
        let mut bpf = Bpf::open(settings.tcx(), settings.ebpf_object.as_deref())?;
        // An earlier agent may have stopped between a change of the maps and this call.
        bpf.next_generation()?;
        Ok(Self {
            key_proof: tunnel::prove(&key, &settings.node),
            preshared: PresharedSource::new(settings.preshared_key),
            settings,
            links,
            uplinks: Uplinks::default(),
            bpf,
            key,
            tunnel: None,
            handshakes: Handshakes::default(),
            restored: 0,
            listener,
            surroundings: None,
            without: Without::default(),
            unchecked_connections: true,
        })
    }

    /// A function that copies the programs' log lines to the agent's log: [`Bpf::take_trace`].
    pub fn take_trace(&mut self) -> Option<impl FnMut() + Send + 'static> {
        self.bpf.take_trace()
    }

    /// The tunnel, on a node that has one.
    pub fn tunnel(&self) -> Option<Tunnel> {
        self.tunnel.clone()
    }

    /// Reads what the plan depends on besides the topology.
    pub async fn observe(&mut self, topology: &Topology) -> Observed {
        let mut outcome = Outcome::default();
        let preshared_changed = outcome.keep(self.preshared.read(&self.settings.preshared_key_file)).unwrap_or(false);
        let pool = topology.pool_of(&self.settings.node).map(|(_, pool)| pool);
        let member = pool.and_then(|pool| pool.members.get(&self.settings.node));
        let address = self.settings.node_ip.or(member.map(|m| m.address));
        let others = pool.map(|pool| pool.neighbours(&self.settings.node)).unwrap_or_default();
        let found = match address {
            Some(address) => self.uplinks.find(&self.links, address, &others).await.map(Some),
            None => Ok(None),
        };
        let moved_to = match &found {
            Err(link::Error::NoUplink(former)) => self.links.own_address(*former).await,
            _ => None,
        };
        let uplink = outcome.keep(found).flatten();
        let me = self.me(uplink.as_ref(), moved_to);
        Observed { me, uplink, in_pool: member.is_some(), preshared_changed, outcome }
    }

    fn me(&mut self, uplink: Option<&Uplink>, moved_to: Option<IpAddr>) -> Me {
        let default = Me::default();
        Me {
            node: self.settings.node.clone(),
            uplink_mtu: uplink.map_or(default.uplink_mtu, |u| u.mtu),
            tunnel_mtu: self.settings.tunnel_mtu,
            protected: self.settings.protected.iter().copied().collect(),
            subnets: uplink.map(|u| u.subnets.clone()).unwrap_or_default(),
            addresses: uplink.map(|u| u.node_addresses.clone()).unwrap_or_default(),
            moved_to,
            intercepting_gateway: self.bpf.intercepting_gateway(),
            preshared: self.preshared.current(),
            ipv6: link::has_ipv6(),
        }
    }

    /// Runs the drivers. `new_topology`: the plan follows from another topology than that of the last run.
    pub async fn apply(&mut self, plan: Arc<Plan>, observed: Observed, new_topology: bool) -> Arc<Report> {
        let Observed { uplink, in_pool, preshared_changed, mut outcome, me: _ } = observed;
        match (&uplink, plan.role) {
            (_, Role::None) => self.take_down(&mut outcome).await,
            (Some(uplink), _) => self.bring_up(&plan, uplink, &mut outcome).await,
            // Without an uplink nothing can be decided: the present state stays.
            (None, _) => outcome.rerun_within(UPLINK_RETRY),
        }
        if uplink.is_some() || !in_pool {
            self.apply_interception(plan.interception.as_ref(), &mut outcome).await;
        }
        if !new_topology && !preshared_changed {
            self.restored += outcome.change.0;
        }
        Arc::new(Report {
            plan,
            failures: outcome.failures,
            surroundings: outcome.surroundings,
            neighbours: self.surroundings.as_ref().and_then(|checked| checked.neighbours.clone()).unwrap_or_default(),
            fails_closed: outcome.fails_closed,
            change: outcome.change,
            restored: self.restored,
            tier: outcome.tier,
            tier_reason: outcome.tier_reason,
            backend: self.tunnel.as_ref().map(Tunnel::backend),
            public_key: tunnel::public(&self.key),
            key_proof: self.key_proof.clone(),
            rerun_after: outcome.rerun_after,
            ended: Instant::now(),
        })
    }

    /// Brings a node of a pool to its plan: what keeps packets from leaking, then devices, state and programs.
    async fn bring_up(&mut self, plan: &Plan, uplink: &Uplink, outcome: &mut Outcome) {
        let Some(want) = &plan.overlay else { return };
        // Fail closed: from here on, a packet for another pool leaves by Raven or not at all. The exemption from source
        // NAT comes before the rule, because the first packet of a flow determines its source.
        let before = outcome.change;
        self.ensure_sources(plan, outcome).await;
        let failures = outcome.failures.len();
        self.ensure_barriers(plan, outcome).await;
        outcome.take(self.links.ensure_rules().await);
        outcome.fails_closed = outcome.failures.len() == failures;
        self.unchecked_connections |= outcome.change != before;
        if std::mem::take(&mut self.unchecked_connections) {
            forget_masqueraded(plan, outcome).await;
        }
        let Some(overlay) = outcome.keep(self.links.ensure_overlay(want).await) else { return };
        let _ = outcome.keep(self.links.ensure_forwarding(names::OVERLAY, overlay).await);
        outcome.take(self.links.ensure_addresses(names::OVERLAY, overlay, &want.addresses).await);
        let tunnel = self.ensure_tunnel(plan, outcome).await;
        let indexes = Indexes { uplink: uplink.index, overlay, tunnel };
        outcome.take(self.configure(plan, indexes, self.abilities(plan, uplink)));
        match &self.tunnel {
            Some(tunnel) => self.handshakes.retry(tunnel, &plan.state, outcome).await,
            None => self.handshakes.clear(),
        }
        if !self.attach_device_programs(indexes, outcome).await && plan.config.encrypted {
            // The stack would forward packets to members in clear.
            return self.remove_tunnel(outcome).await;
        }
        self.change_state(plan, indexes, outcome).await;
        if self.handshakes.is_pending() {
            outcome.rerun_within(FIRST_RETRY);
        }
        self.attach_uplink_programs(plan, uplink, indexes, outcome).await;
        // Again, because only now it is known which program guards the uplink.
        let abilities = self.abilities(plan, uplink);
        outcome.take(self.configure(plan, indexes, abilities));
        if plan.tunnel.is_none() {
            self.remove_tunnel(outcome).await;
        }
        if surroundings::has_overlay(plan) {
            outcome.surroundings.extend(surroundings::wrong_source(plan.role, plan.config.address, uplink, abilities));
        }
        self.check_surroundings(plan, indexes, uplink, outcome).await;
    }

    async fn ensure_sources(&mut self, plan: &Plan, outcome: &mut Outcome) {
        let sources = Sources::new(&plan.own_prefixes(), self.settings.masquerade_mark, plan.config.address);
        let Ensured { pods, hosts, guard } = sources.ensure(self.without).await;
        outcome.take(pods);
        // Not failed steps: this kernel has not got the modules, and forwards pods all the same.
        for (result, without) in [(hosts, &mut self.without.hosts), (guard, &mut self.without.guard)] {
            match result {
                Ok(change) => outcome.change += change,
                Err(e) => {
                    tracing::warn!(error = %e, "a part of Raven's nft table is left out until the agent's next start");
                    *without = true;
                }
            }
        }
    }

    async fn check_surroundings(&mut self, plan: &Plan, indexes: Indexes, uplink: &Uplink, outcome: &mut Outcome) {
        let last = self.surroundings.take();
        let checked = match last {
            Some(last) if !outcome.change.any() && last.next > Instant::now() => last,
            last => self.look_around(plan, indexes, uplink, last).await,
        };
        outcome.surroundings.extend(checked.found.iter().cloned());
        outcome.rerun_within(checked.next.saturating_duration_since(Instant::now()));
        outcome.surroundings.extend(checked.overflowed.keys().map(|family| surroundings::overflow(family)));
        self.surroundings = Some(checked);
    }

    async fn look_around(&self, plan: &Plan, indexes: Indexes, uplink: &Uplink, last: Option<Checked>) -> Checked {
        let start = Instant::now();
        let found = surroundings::check(&self.links, plan, indexes, uplink).await;
        let mut overflowed = last.as_ref().map(|last| last.overflowed.clone()).unwrap_or_default();
        overflowed.retain(|_, at| at.elapsed() < OVERFLOW_SHOWN);
        let before = last.and_then(|last| last.neighbours);
        let neighbours = match self.links.neighbours(uplink.sources.iter().map(|(node, _)| *node)).await {
            Ok(now) => {
                // Without an earlier value, the counters may have increased at any time since boot.
                let families = before.iter().flat_map(|before| now.overflowed_since(before));
                overflowed.extend(families.map(|family| (family, start)));
                Some(now)
            }
            Err(e) => {
                tracing::warn!(error = %e, "the kernel's neighbour tables are not checked");
                before
            }
        };
        let next = start + SURROUNDINGS_PERIOD.max(start.elapsed() * SURROUNDINGS_SHARE);
        Checked { next, found, neighbours, overflowed }
    }

    fn configure(&mut self, plan: &Plan, indexes: Indexes, abilities: Abilities) -> Result<Change, bpf::Error> {
        let generation = self.bpf.generation()?;
        self.bpf.set_config(plan.config.to_table(indexes, abilities, generation))
    }

    fn abilities(&self, plan: &Plan, uplink: &Uplink) -> Abilities {
        Abilities {
            redirects_into_tunnel: self.may_redirect(),
            guards_in_xdp: uplink.wan.is_none()
                && uplink.pool_devices().iter().all(|device| self.bpf.is_attached(Hook::UplinkXdp, device.index)),
            // The kernel sends only from its own addresses.
            sets_source: self.settings.release.has_tunnel_source()
                && uplink.node_addresses.contains(&plan.config.address),
            one_uplink: uplink.other_devices.is_empty(),
        }
    }

    /// Ensures that the planned tunnel device exists; returns its index.
    async fn ensure_tunnel(&mut self, plan: &Plan, outcome: &mut Outcome) -> Option<u32> {
        let want = plan.tunnel.as_ref()?;
        let Some(tunnel) = outcome.keep(Tunnel::ensure(&self.links, self.settings.wireguard_engine).await) else {
            outcome.rerun_within(ENGINE_RETRY);
            return None;
        };
        self.tunnel = Some(tunnel.clone());
        let configured = outcome.keep(tunnel.configure(self.key.clone(), want.port).await);
        // Otherwise the port may belong to another program, or the device may have another key.
        let key = tunnel::public(&self.key);
        outcome.take(self.bpf.set_handshake_key(configured.is_some().then_some(&key)));
        // With its port taken by another program, the device keeps its previous one. Without any, it carries nothing.
        if configured.is_none() && !tunnel.has_port().await {
            self.tunnel = None;
            return None;
        }
        let index = outcome.keep(self.links.ensure_up(names::TUNNEL, want.mtu).await)?;
        let _ = outcome.keep(self.links.ensure_forwarding(names::TUNNEL, index).await);
        // The source of masqueraded packets and of host processes on this node, as on the overlay.
        if let Some(overlay) = &plan.overlay {
            outcome.take(self.links.ensure_addresses(names::TUNNEL, index, &overlay.addresses).await);
        }
        Some(index)
    }

    async fn remove_tunnel(&mut self, outcome: &mut Outcome) {
        self.tunnel = None;
        self.handshakes.clear();
        outcome.take(self.bpf.set_handshake_key(None));
        outcome.take(tunnel::remove(&self.links, self.settings.wireguard_engine).await);
        // Last: until then, the device may have peers.
        self.bpf.detach(Hook::TunnelIngress);
        self.bpf.detach(Hook::TunnelEgress);
    }

    /// Some kernels crash when WireGuard receives a packet with tunnel metadata, which the overlay device adds. A TUN
    /// device ignores it.
    fn may_redirect(&self) -> bool {
        let kernel = self.tunnel.as_ref().is_some_and(|t| t.backend() == Backend::Kernel);
        !kernel || self.settings.release.wireguard_takes_metadata()
    }

    /// Removes everything from a node that is in no pool.
    async fn take_down(&mut self, outcome: &mut Outcome) {
        self.remove_tunnel(outcome).await;
        for hook in Hook::ALL {
            self.bpf.detach(hook);
        }
        if !self.settings.tcx() {
            bpf::detach_uplink_filter();
        }
        outcome.take(self.links.delete_rules().await);
        // The kernel deletes its routes with the device.
        outcome.take(self.links.delete_device(names::OVERLAY).await);
        outcome.take(self.links.delete_barriers().await);
        outcome.take(netfilter::remove().await);
        let Some(have) = outcome.keep(self.bpf.read()) else { return };
        let steps = diff(&have, &State::default());
        for step in &steps {
            outcome.take(self.bpf.apply(step));
        }
        if !steps.is_empty() {
            let _ = outcome.keep(self.bpf.next_generation());
        }
    }
}

async fn forget_masqueraded(plan: &Plan, outcome: &mut Outcome) {
    let own = plan.own_prefixes();
    let forget = conntrack::forget_masqueraded(&own, plan.state.barriers.iter().copied());
    match timeout(CONNTRACK_LIMIT, forget).await {
        Ok(Ok(change)) => outcome.change += change,
        // Not failed steps: a kernel without ctnetlink does everything else.
        Ok(Err(e)) => tracing::warn!(error = %e, "cannot correct the sources of connections that began before Raven"),
        Err(_) => tracing::warn!(
            seconds = CONNTRACK_LIMIT.as_secs(),
            "the kernel did not list its connections in time; the sources of those that began before Raven are not corrected"
        ),
    }
}
