//! Brings the kernel to what the plan says: reads what is there, diffs, runs the steps. One failed step never stops the
//! others; what failed is reported and tried again with the next run.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream};
use tokio::time::Instant;

use raven_common::tables::KubeletAddress;
use wireguard_control::Key;

use crate::{
    bpf::{self, Attached, Bpf, Hook, probe::Release},
    config::{TcAttach, Tier},
    diff::{Peer, State, Step, diff},
    link::{self, Links, Uplink, Way, set_sysctls},
    names, netfilter,
    plan::{Detour, Indexes, Me, Plan, Role, plan},
    surroundings,
    topology::{PresharedKey, PublicKey, Topology},
    tunnel::{self, Backend, Tunnel},
};

/// How often the surroundings are looked at when nothing changes.
const LOOK_AROUND: Duration = Duration::from_secs(25);

/// What a run found and did.
#[derive(Clone, Debug)]
pub struct Report {
    /// What should be.
    pub plan: Plan,
    /// What could not be done, one sentence each.
    pub failures: Vec<String>,
    /// What is around us and stops packets, one sentence each.
    pub surroundings: Vec<String>,
    /// How many things were changed.
    pub changes: usize,
    /// How packets enter the tunnel: `xdp+tc`, `tc` or `stack`; on a gateway node.
    pub tier: Option<&'static str>,
    /// Why not the fastest tier.
    pub tier_reason: Option<String>,
    /// Who does WireGuard, on a gateway node.
    pub backend: Option<Backend>,
    /// Our own public key.
    pub public_key: PublicKey,
    /// Addresses on the uplink.
    pub uplink: Option<Uplink>,
    /// How many things were changed, since the agent's start, though nothing new was told: somebody else had taken them away, or they could
    /// not be had before.
    pub put_back: u64,
    /// Look again so soon.
    pub again: Option<Duration>,
    /// When the run ended.
    pub ended: Instant,
}

impl Report {
    /// Everything that a person should know of.
    pub fn complaints(&self) -> impl Iterator<Item = &String> {
        self.failures.iter().chain(&self.plan.problems).chain(&self.surroundings)
    }
}

/// What stays the same for the life of the process.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Address by which the uplink is found, if the Node object's is on no device.
    pub node_ip: Option<IpAddr>,
    /// Never into the tunnel.
    pub protected: Vec<ipnet::IpNet>,
    /// The running kernel.
    pub release: Release,
    /// How to attach TC programs.
    pub tc_attach: TcAttach,
    /// How a gateway node takes overlay packets.
    pub tier: Tier,
    /// An object in place of the built-in one.
    pub ebpf_object: Option<PathBuf>,
    /// Where the cluster's preshared key is, if there is one; and the one that counts where there is no such file.
    pub preshared_key_file: PathBuf,
    /// See above.
    pub preshared_key: Option<PresharedKey>,
}

impl Settings {
    /// TCX or clsact.
    pub fn tcx(&self) -> bool {
        match self.tc_attach {
            TcAttach::Auto => self.release.has_tcx(),
            TcAttach::Tcx => true,
            TcAttach::Clsact => false,
        }
    }
}

/// The drivers, and who calls them. One task owns it.
pub struct Reconciler {
    settings: Settings,
    links: Links,
    bpf: Bpf,
    key: Key,
    /// Of all tunnels; unknown until it could be read once.
    preshared: Option<Option<PresharedKey>>,
    tunnel: Option<Tunnel>,
    /// Where peers that are gone were heard from last. One that comes back is asked there for a new session: by itself it may go on with
    /// the old one, which we have forgotten, for two minutes.
    left: BTreeMap<PublicKey, SocketAddr>,
    /// Peers that we dial and that have not answered yet.
    knocking: BTreeMap<PublicKey, Knock>,
    put_back: u64,
    /// The proxy's listener for connections by address.
    listener: Option<std::net::TcpListener>,
    /// What was found around us, and when: netfilter's rules can be many, so they are not read at every run.
    surroundings: Option<(Instant, Vec<String>)>,
}

/// A peer that is new to us may not know us yet, and does not answer then; WireGuard itself tries again only after five seconds. We do
/// after half a second, and after twice as long each time: the answer of one that is far away must find the handshake that it is for.
const KNOCK: Duration = Duration::from_millis(500);
/// Then it is left to WireGuard.
const KNOCK_LAST: Duration = Duration::from_secs(4);

/// See [`KNOCK`].
struct Knock {
    last: Instant,
    wait: Duration,
}

/// Route requests that wait for their answers at a time.
const IN_FLIGHT: usize = 64;

fn is_route(step: &Step) -> bool {
    matches!(step, Step::PutRoute(..) | Step::DeleteRoute(_))
}

async fn route(links: &Links, step: &Step, indexes: Indexes) -> Result<(), String> {
    tracing::debug!(?step, "apply");
    let result = match step {
        Step::PutRoute(prefix, route) => links.put_route(*prefix, route, indexes).await,
        Step::DeleteRoute(prefix) => links.delete_route(*prefix).await,
        _ => Ok(()),
    };
    result.map_err(|e| e.to_string())
}

/// One run's notes.
#[derive(Default)]
struct Notes {
    failures: Vec<String>,
    surroundings: Vec<String>,
    changes: usize,
    tier: Option<&'static str>,
    tier_reason: Option<String>,
    again: Option<Duration>,
}

impl Notes {
    /// Counts a change, or notes why there was none.
    fn take<E: std::fmt::Display>(&mut self, result: Result<bool, E>) {
        match result {
            Ok(changed) => self.changes += usize::from(changed),
            Err(e) => self.failures.push(e.to_string()),
        }
    }
}

impl Reconciler {
    /// Loads the programs and takes over what an earlier agent left.
    pub fn new(settings: Settings, links: Links, key: Key, listener: Option<std::net::TcpListener>) -> Result<Self, bpf::Error> {
        let mut bpf = Bpf::open(settings.tcx(), settings.ebpf_object.as_deref())?;
        // An earlier agent may have died between a change and this.
        bpf.next_generation()?;
        Ok(Self {
            settings,
            links,
            bpf,
            key,
            preshared: None,
            tunnel: None,
            left: BTreeMap::new(),
            knocking: BTreeMap::new(),
            put_back: 0,
            listener,
            surroundings: None,
        })
    }

    /// See [`Bpf::take_trace`].
    pub fn take_trace(&mut self) -> Option<impl FnMut() + Send + 'static> {
        self.bpf.take_trace()
    }

    /// The tunnel, on a gateway node.
    pub fn tunnel(&self) -> Option<Tunnel> {
        self.tunnel.clone()
    }

    /// See the module's text. `news`: the topology is another one than last time.
    pub async fn reconcile(&mut self, topology: &Topology, news: bool) -> Arc<Report> {
        let mut notes = Notes::default();
        let news = self.read_preshared(&mut notes) || news;
        let member = topology.pool_of(&self.settings.node).and_then(|(_, pool)| pool.members.get(&self.settings.node));
        let address = self.settings.node_ip.or(member.map(|m| IpAddr::V4(m.outer)));
        let uplink = match address {
            Some(address) => self.links.uplink(address).await.map_err(|e| notes.failures.push(e.to_string())).ok(),
            None => None,
        };
        let mut plan = plan(topology, &self.me(uplink.as_ref()));
        if !link::has_ipv6() {
            plan.state.routes.retain(|prefix, _| prefix.addr().is_ipv4());
            plan.overlay.iter_mut().for_each(|overlay| overlay.addresses.retain(|address| address.addr().is_ipv4()));
        }
        match (&uplink, plan.role) {
            (_, Role::None) => self.take_down(&mut notes).await,
            (Some(uplink), _) => self.bring_up(&plan, uplink, &mut notes).await,
            // Nothing can be decided without the uplink; what works goes on working.
            (None, _) => {}
        }
        if uplink.is_some() || member.is_none() {
            self.detour(plan.detour.as_ref(), &mut notes).await;
        }
        if !news {
            self.put_back += notes.changes as u64;
        }
        Arc::new(Report {
            put_back: self.put_back,
            again: notes.again,
            ended: Instant::now(),
            plan,
            failures: notes.failures,
            surroundings: notes.surroundings,
            changes: notes.changes,
            tier: notes.tier,
            tier_reason: notes.tier_reason,
            backend: self.tunnel.as_ref().map(Tunnel::backend),
            public_key: tunnel::public(&self.key),
            uplink,
        })
    }

    /// Connections to edge nodes' kubelets by address: whoever takes them is there before they are sent there, and goes after.
    async fn detour(&mut self, plan: Option<&Detour>, notes: &mut Notes) {
        let overlay = match plan {
            Some(detour) if !detour.here => self.links.find(names::OVERLAY).await.ok().flatten().map(|found| found.index),
            _ => None,
        };
        let here = plan.filter(|detour| detour.here).zip(self.listener.as_ref());
        if let Some(detour) = plan {
            let addresses = detour.nodes.iter().flat_map(|(address, name)| {
                let key = |port: &u16| KubeletAddress { address: address.octets(), port: *port, _pad: 0 };
                detour.ports.iter().map(move |port| (key(port), name.clone()))
            });
            let addresses: BTreeMap<KubeletAddress, String> = addresses.collect();
            notes.take(self.bpf.set_kubelets(&addresses).map(|n| n > 0));
        }
        if let Some((_, listener)) = here {
            let attached = self.bpf.intercept(listener);
            if let Err(e) = attached {
                // By name everything works: said, and no reason to call the node unready for L3.
                return notes.surroundings.push(format!("kubelets of edge nodes are not reached by address here, only by name: {e}"));
            }
            notes.take(attached);
        }
        let way = if here.is_some() { Some(Way::Local) } else { overlay.map(Way::Overlay) };
        let want = plan.zip(way).map(|(detour, way)| link::Detour {
            way,
            addresses: detour.nodes.keys().copied().collect(),
            ports: detour.ports.clone(),
            source: detour.source,
        });
        notes.take(self.links.ensure_detour(want.as_ref()).await.map(|n| n > 0));
        if here.is_none() {
            notes.take(self.bpf.intercept_nothing());
        }
        if plan.is_none() {
            notes.take(self.bpf.set_kubelets(&BTreeMap::new()).map(|n| n > 0));
        }
    }

    fn me(&mut self, uplink: Option<&Uplink>) -> Me {
        let subnets = uplink.into_iter().flat_map(|u| u.subnets.iter().copied());
        Me {
            node: self.settings.node.clone(),
            uplink_mtu: uplink.map_or(1500, |u| u.mtu),
            protected: self.settings.protected.iter().copied().chain(subnets).collect(),
            addresses: uplink.map(|u| u.node_addresses.clone()).unwrap_or_default(),
            detour: self.bpf.detour(),
            preshared: self.preshared.flatten(),
        }
    }

    /// True if it is another one than before. One that cannot be read stays what it was.
    fn read_preshared(&mut self, notes: &mut Notes) -> bool {
        match tunnel::load_preshared(&self.settings.preshared_key_file) {
            Ok(preshared) => {
                let preshared = preshared.or(self.settings.preshared_key);
                let before = self.preshared.replace(preshared);
                if before.flatten() != preshared {
                    let what = if preshared.is_some() { "tunnels have a preshared key" } else { "tunnels have no preshared key any more" };
                    tracing::info!(file = %self.settings.preshared_key_file.display(), "{what}: both ends must agree");
                }
                before != Some(preshared)
            }
            Err(e) => {
                notes.failures.push(e.to_string());
                false
            }
        }
    }

    async fn bring_up(&mut self, plan: &Plan, uplink: &Uplink, notes: &mut Notes) {
        let Some(overlay) = &plan.overlay else { return };
        let addresses = &overlay.addresses;
        let overlay = match self.links.ensure_overlay(overlay).await {
            Ok(index) => index,
            Err(e) => return notes.failures.push(e.to_string()),
        };
        notes.failures.extend(set_sysctls(names::OVERLAY));
        notes.take(self.links.ensure_addresses(names::OVERLAY, overlay, addresses).await);
        let tunnel = self.ensure_tunnel(plan, notes).await;
        let indexes = Indexes { uplink: uplink.index, overlay, tunnel };
        let xdp = self.bpf.is_attached(Hook::UplinkXdp, uplink.index);
        notes.take(self.configure(plan, indexes, xdp));
        self.knock(plan, notes).await;
        self.change_state(plan, indexes, notes).await;
        notes.again = (!self.knocking.is_empty()).then_some(KNOCK);
        self.attach(plan, uplink, indexes, notes).await;
        // Who guards the uplink is known only now.
        let xdp = self.bpf.is_attached(Hook::UplinkXdp, uplink.index);
        notes.take(self.configure(plan, indexes, xdp));
        if plan.role == Role::Ordinary {
            self.remove_tunnel(notes).await;
        }
        notes.take(self.links.ensure_rules().await.map(|made| made > 0));
        notes.take(netfilter::ensure().await);
        let recent = self.surroundings.take().filter(|(when, _)| notes.changes == 0 && when.elapsed() < LOOK_AROUND);
        let (when, found) = match recent {
            Some(recent) => recent,
            None => (Instant::now(), surroundings::look(&self.links, plan, indexes, &uplink.name).await),
        };
        notes.surroundings.extend(found.iter().cloned());
        self.surroundings = Some((when, found));
        let next_look = LOOK_AROUND.saturating_sub(when.elapsed());
        notes.again = Some(notes.again.map_or(next_look, |again| again.min(next_look)));
    }

    fn configure(&mut self, plan: &Plan, indexes: Indexes, xdp: bool) -> Result<bool, bpf::Error> {
        let generation = self.bpf.generation()?;
        self.bpf.set_config(plan.config.to_table(indexes, self.may_redirect(), xdp, generation))
    }

    /// The tunnel device's index, on a gateway node.
    async fn ensure_tunnel(&mut self, plan: &Plan, notes: &mut Notes) -> Option<u32> {
        let want = plan.tunnel.as_ref()?;
        let tunnel = match Tunnel::ensure(&self.links).await {
            Ok(tunnel) => tunnel,
            Err(e) => {
                notes.failures.push(e.to_string());
                return None;
            }
        };
        self.tunnel = Some(tunnel.clone());
        if let Err(e) = tunnel.configure(self.key.clone(), want.port).await {
            notes.failures.push(e.to_string());
            // A port that is taken is no reason to take down what works by another one. An engine without any ends at its first packet.
            if !tunnel.has_port().await {
                self.tunnel = None;
                return None;
            }
        }
        match self.links.ensure_up(names::TUNNEL, want.mtu).await {
            Ok(index) => {
                notes.failures.extend(set_sysctls(names::TUNNEL));
                Some(index)
            }
            Err(e) => {
                notes.failures.push(e.to_string());
                None
            }
        }
    }

    /// A node that is no gateway node any more.
    async fn remove_tunnel(&mut self, notes: &mut Notes) {
        self.tunnel = None;
        self.knocking.clear();
        notes.take(tunnel::remove(&self.links).await);
    }

    /// WireGuard of the kernel may choke on what the overlay device received; a TUN device does not.
    fn may_redirect(&self) -> bool {
        let kernel = self.tunnel.as_ref().is_some_and(|t| t.backend() == Backend::Kernel);
        !kernel || self.settings.release.wireguard_takes_metadata()
    }

    async fn change_state(&mut self, plan: &Plan, indexes: Indexes, notes: &mut Notes) {
        let have = match self.read(indexes).await {
            Ok(have) => have,
            Err(e) => return notes.failures.push(e),
        };
        let mut want = Cow::Borrowed(&plan.state);
        if self.preshared.is_none() {
            // Nobody knows the key yet: what WireGuard has is what an earlier agent read.
            for (key, peer) in &mut want.to_mut().peers {
                peer.preshared = have.peers.get(key).and_then(|have| have.preshared);
            }
        }
        let steps = diff(&have, &want);
        // Steps of one kind stand together, and routes do not depend on each other: they are sent without waiting for each
        // answer, or ten thousand of them would take a minute.
        for group in steps.chunk_by(|a, b| is_route(a) && is_route(b)) {
            if is_route(&group[0]) {
                let links = &self.links;
                let mut answers = stream::iter(group).map(|step| route(links, step, indexes)).buffer_unordered(IN_FLIGHT);
                while let Some(answer) = answers.next().await {
                    notes.take(answer.map(|()| true));
                }
                continue;
            }
            for step in group {
                tracing::debug!(?step, "apply");
                notes.take(self.run(step, &have).await.map(|()| true));
            }
        }
        if steps.iter().any(bpf::is_map_entry) {
            notes.take(self.bpf.next_generation().map(|()| false));
        }
        // Once the routes are there. The embedded engine gives a peer up that has not answered for 90 s, until somebody sends something:
        // a site on which nothing happens would be cut off for ever.
        let new = steps.iter().filter_map(|step| if let Step::PutPeer(key, _) = step { Some(key) } else { None });
        let dead = have.peers.iter().filter(|(_, peer)| !peer.alive && peer.keepalive.is_some()).map(|(key, _)| key);
        if let Some(tunnel) = &self.tunnel {
            new.chain(dead).filter_map(|key| plan.state.peers.get(key)).for_each(|peer| tunnel.poke(peer));
        }
    }

    /// Dials peers anew that have not answered yet: one that is taken away and put back is asked at once.
    async fn knock(&mut self, plan: &Plan, notes: &mut Notes) {
        let Some(tunnel) = self.tunnel.clone() else { return self.knocking.clear() };
        if self.knocking.is_empty() {
            return;
        }
        let sessions = match tunnel.sessions().await {
            Ok(sessions) => sessions,
            Err(e) => return notes.failures.push(e.to_string()),
        };
        let silent = |key: &PublicKey| sessions.get(key).is_some_and(|(peer, _)| !peer.alive);
        self.knocking.retain(|key, knock| knock.wait <= KNOCK_LAST && silent(key));
        for (key, knock) in &mut self.knocking {
            let Some(peer) = plan.state.peers.get(key).filter(|_| knock.last.elapsed() >= knock.wait) else { continue };
            *knock = Knock { last: Instant::now(), wait: 2 * knock.wait };
            let put = match tunnel.delete_peer(*key).await {
                Ok(()) => tunnel.put_peer(*key, peer, None).await,
                gone => gone,
            };
            match put {
                Ok(()) => tunnel.poke(peer),
                Err(e) => notes.failures.push(e.to_string()),
            }
        }
    }

    async fn read(&mut self, indexes: Indexes) -> Result<State, String> {
        let mut state = self.bpf.read().map_err(|e| e.to_string())?;
        state.routes = self.links.routes(indexes).await.map_err(|e| e.to_string())?;
        if let Some(tunnel) = &self.tunnel {
            state.peers = tunnel.peers().await.map_err(|e| e.to_string())?;
        }
        Ok(state)
    }

    async fn run(&mut self, step: &Step, have: &State) -> Result<(), String> {
        match step {
            Step::PutPeer(key, peer) => match &self.tunnel {
                Some(tunnel) => {
                    let peer = Peer { endpoint: peer.endpoint.or_else(|| self.left.remove(key)), ..peer.clone() };
                    // Whom we keep a session with we dial, and nobody else is to be asked.
                    if peer.keepalive.is_some() && peer.endpoint.is_some() && !have.peers.contains_key(key) {
                        self.knocking.insert(*key, Knock { last: Instant::now(), wait: KNOCK });
                    }
                    tunnel.put_peer(*key, &peer, have.peers.get(key)).await.map_err(|e| e.to_string())
                }
                None => Err(format!("peer {key} waits for the tunnel device")),
            },
            Step::TakePrefixes(_, prefixes) => match &self.tunnel {
                Some(tunnel) => tunnel.take(prefixes).await.map_err(|e| e.to_string()),
                None => Ok(()),
            },
            Step::DeletePeer(key) => match &self.tunnel {
                Some(tunnel) => {
                    self.left.extend(have.peers.get(key).and_then(|peer| peer.endpoint).map(|endpoint| (*key, endpoint)));
                    tunnel.delete_peer(*key).await.map_err(|e| e.to_string())
                }
                None => Ok(()),
            },
            map_entry => self.bpf.apply(map_entry).map(drop).map_err(|e| e.to_string()),
        }
    }

    /// After the maps are filled: an XDP program that knows no node would drop the pool's packets.
    async fn attach(&mut self, plan: &Plan, uplink: &Uplink, indexes: Indexes, notes: &mut Notes) {
        for (hook, device, index) in [
            (Hook::OverlayIngress, names::OVERLAY, Some(indexes.overlay)),
            (Hook::OverlayEgress, names::OVERLAY, Some(indexes.overlay)),
            (Hook::TunnelIngress, names::TUNNEL, indexes.tunnel),
            (Hook::TunnelEgress, names::TUNNEL, indexes.tunnel),
        ] {
            let Some(index) = index else { continue };
            self.put_program(hook, device, index, notes);
            if let Some(before) = self.asked_before(hook, device, index).await {
                notes.surroundings.push(format!("{before}: keep it off {device}"));
            }
        }
        if indexes.tunnel.is_none() || plan.role != Role::Gateway {
            for hook in [Hook::UplinkXdp, Hook::UplinkIngress, Hook::TunnelIngress, Hook::TunnelEgress] {
                self.bpf.detach(hook);
                if !self.settings.tcx() && hook == Hook::UplinkIngress {
                    bpf::detach_filter(hook, &uplink.name);
                }
            }
            return;
        }
        // The reader of XDP's notes before their writer.
        let reads = self.put_program(Hook::UplinkIngress, &uplink.name, uplink.index, notes);
        let obstacle = match self.settings.tier {
            Tier::Tc => Some("--tier=tc".to_owned()),
            Tier::Auto if !reads => Some(format!("{} is not attached", Hook::UplinkIngress.program())),
            Tier::Auto => self.asked_before(Hook::UplinkIngress, &uplink.name, uplink.index).await,
        };
        self.put_xdp(uplink, obstacle, notes);
    }

    /// Who is asked before `hook`'s program, in words, and what follows from it.
    async fn asked_before(&self, hook: Hook, device: &str, index: u32) -> Option<String> {
        let mut before = self.bpf.asked_before(hook, device, index);
        if !self.settings.tcx() {
            before.extend(self.links.filters_before(index, hook.is_egress(), hook.program()).await);
        }
        let direction = if hook.is_egress() { "egress" } else { "ingress" };
        (!before.is_empty()).then(|| {
            format!(
                "at TC {direction} of {device} {} is asked before {}, which sees no packet of which that says the last word (Cilium below \
                 Linux 6.6: cilium config set bpf-filter-priority 2)",
                before.join(", "),
                hook.program()
            )
        })
    }

    /// True if it is there then.
    fn put_program(&mut self, hook: Hook, device: &str, index: u32, notes: &mut Notes) -> bool {
        let attached = self.bpf.attach(hook, device, index);
        let there = attached.is_ok();
        notes.take(attached.map(|a| a != Attached::Unchanged && (self.settings.tcx() || a == Attached::New)));
        there
    }

    /// The fast tier, where it can be had: what XDP unwraps needs `uplink_ingress` to see it.
    fn put_xdp(&mut self, uplink: &Uplink, obstacle: Option<String>, notes: &mut Notes) {
        let fallback = if self.may_redirect() { "tc" } else { "stack" };
        if obstacle.is_some() {
            self.bpf.detach(Hook::UplinkXdp);
            (notes.tier, notes.tier_reason) = (Some(fallback), obstacle);
            return;
        }
        match self.bpf.attach(Hook::UplinkXdp, &uplink.name, uplink.index) {
            Ok(attached) => {
                notes.changes += usize::from(attached != Attached::Unchanged);
                notes.tier = Some("xdp+tc");
            }
            // No failure: the fallback tier does the work.
            Err(e) => (notes.tier, notes.tier_reason) = (Some(fallback), Some(e.to_string())),
        }
    }

    /// For a node that is in no pool (any more).
    async fn take_down(&mut self, notes: &mut Notes) {
        for hook in Hook::ALL {
            self.bpf.detach(hook);
        }
        if !self.settings.tcx() {
            bpf::detach_uplink_filter();
        }
        notes.take(self.links.delete_rules().await.map(|gone| gone > 0));
        self.remove_tunnel(notes).await;
        // Its routes go with it.
        notes.take(self.links.delete_device(names::OVERLAY).await);
        notes.take(netfilter::remove().await);
        match self.bpf.read() {
            Ok(have) => {
                let steps = diff(&have, &State::default());
                for step in &steps {
                    notes.take(self.bpf.apply(step));
                }
                if !steps.is_empty() {
                    notes.take(self.bpf.next_generation().map(|()| false));
                }
            }
            Err(e) => notes.failures.push(e.to_string()),
        }
    }
}
