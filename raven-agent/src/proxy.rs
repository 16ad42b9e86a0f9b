//! The L7 half: carries requests from the cloud to kubelets at sites that cannot be dialled, through connections that
//! the sites open.
//!
//! In the order of a request: [`ingress`] accepts it on a cloud gateway node ([`client_hello`] reads the TLS server
//! name, [`http`] a Host header); [`Directory`](crate::plan::proxy::Directory) finds the target node; [`router`]
//! and [`connections`] open a stream to its site; there [`serve`] connects to the node; [`stream`] carries the
//! bytes. TLS is not terminated. Proxy connections: [`dial`] opens them at the edge, [`accept`] admits them in the
//! cloud, [`liveness`] notices dead ones, [`siblings`] dead cloud gateway nodes, [`identity`] and [`enrol`] provide
//! certificates. [`fairness`] shares the streams among clients; [`limits`] has all windows, limits and timeouts;
//! [`stats`] has the counters.
//!
//! The L7 half does not depend on L3.

mod abort;
mod accept;
pub mod client_hello;
mod connections;
mod counted;
mod dial;
mod enrol;
mod fairness;
mod http;
mod identity;
mod ingress;
mod limits;
mod liveness;
mod pending;
mod router;
mod serve;
mod siblings;
pub mod stats;
mod stream;

pub use limits::Liveness;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use kube::Client;
use raven_api::{
    gateway_node::ProxyStatus,
    proxy::{KUBELET_PORT, secure_listener},
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::interval};

use self::{
    accept::EdgeListener,
    connections::Connections,
    enrol::{Enrolment, Purpose, Wanted},
    identity::Identity,
    ingress::{Ingress, Kind},
    router::Router,
    serve::EdgeServer,
    siblings::Siblings,
    stats::Stats,
};
use crate::plan::proxy::{ByName, ProxyPlan, ProxyRole};

/// Interval at which a listener that could not be opened is retried.
const RETRY: Duration = Duration::from_secs(5);

/// Settings that stay the same for the life of the process.
#[derive(Clone, Debug)]
pub struct ProxySettings {
    /// Name of this node.
    pub node: String,
    /// Folder for keys and certificates.
    pub state: PathBuf,
    /// Address for TLS requests to the kubelets' port.
    pub secure: SocketAddr,
    /// Address for plain HTTP requests.
    pub insecure: SocketAddr,
    /// How dead connections are noticed.
    pub liveness: Liveness,
}

/// The state of the L7 half, for the GatewayNode.
#[derive(Clone, Debug, PartialEq)]
pub struct ProxyReport {
    /// Gateway that this node is elected for.
    pub gateway: String,
    /// Status of the proxy.
    pub status: ProxyStatus,
    /// Number of cloud nodes to which this node should have connections; 0 in the cloud, which is dialled.
    pub dials: usize,
}

/// The L7 half of this node.
pub struct Proxy {
    settings: ProxySettings,
    client: Option<Client>,
    plans: watch::Receiver<Arc<ProxyPlan>>,
    report: watch::Sender<Option<ProxyReport>>,
    stats: Stats,
    intercepted: Option<std::net::TcpListener>,
}

/// A listener for intercepted connections, which routing and the `kubelet_lookup` program deliver.
///
/// It is transparent, so that responses can have other nodes' addresses (IP_TRANSPARENT, ip(7); needs CAP_NET_ADMIN),
/// and on loopback, so that no other connection reaches it.
pub fn listen_for_intercepted() -> std::io::Result<std::net::TcpListener> {
    use socket2::{Domain, Socket, Type};
    // One dual-stack socket, or an IPv4 socket if the kernel has no IPv6.
    let (socket, loopback) = match Socket::new(Domain::IPV6, Type::STREAM, None) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            // Not `[::1]`, which is missing if `disable_ipv6` is set.
            (socket, IpAddr::from(Ipv4Addr::LOCALHOST.to_ipv6_mapped()))
        }
        Err(_) => (Socket::new(Domain::IPV4, Type::STREAM, None)?, IpAddr::from(Ipv4Addr::LOCALHOST)),
    };
    // For an IPv6 socket, too: IP_TRANSPARENT and IPV6_TRANSPARENT set the same flag.
    socket.set_ip_transparent_v4(true)?;
    // Accepted connections have the dialled port as their own. Without this option the node's own kubelet could not
    // listen on that port after a restart while such a connection exists or is in TIME_WAIT (EADDRINUSE).
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(loopback, 0).into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// A task of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    /// Accepts proxy connections on this port.
    EdgeListener(u16),
    /// Accepts requests by name on this address.
    Ingress(Kind, SocketAddr),
    /// Accepts intercepted connections.
    Intercepted,
    /// Dials the cloud.
    Dialler,
    /// Checks the other proxies of the pool.
    Siblings,
}

impl Proxy {
    /// A proxy that follows `plans`. `client` is `None` offline, where only stored certificates are used.
    /// `intercepted`: from [`listen_for_intercepted`].
    pub fn new(
        settings: ProxySettings,
        client: Option<Client>,
        plans: watch::Receiver<Arc<ProxyPlan>>,
        report: watch::Sender<Option<ProxyReport>>,
        stats: Stats,
        intercepted: Option<std::net::TcpListener>,
    ) -> Self {
        Self { settings, client, plans, report, stats, intercepted }
    }

    /// Runs until the task is dropped.
    pub async fn run(mut self) {
        let shared = Shared::new(self.stats.clone(), self.settings.liveness);
        let enrolment = Enrolment {
            node: self.settings.node.clone(),
            client: self.client.clone(),
            state: self.settings.state.clone(),
            wanted: shared.wanted.subscribe(),
            identity: shared.identity.clone(),
            problem: shared.problem.clone(),
        };
        let _enrolment = Task(tokio::spawn(enrolment.run()));
        let mut running: BTreeMap<Part, Task> = BTreeMap::new();
        let (mut identity, mut problem) = (shared.identity.subscribe(), shared.problem.subscribe());
        let (mut established, mut unreachable) = (shared.established.subscribe(), shared.unreachable.subscribe());
        let mut retry = interval(RETRY);
        loop {
            let plan = self.plans.borrow_and_update().clone();
            shared.publish(&plan, self.settings.insecure.port());
            let mut failures = self.run_parts(&plan, &shared, &mut running).await;
            failures.extend(problem.borrow_and_update().clone());
            // The Service sends requests by name to ready nodes. Interception does not count: the reconciler
            // reports its state.
            let needed = self.parts(&plan, false);
            let ready = identity.borrow_and_update().is_some() && needed.iter().all(|part| running.contains_key(part));
            let status =
                status(&plan.role, ready, &established.borrow_and_update(), &unreachable.borrow_and_update(), failures);
            let dials = if let ProxyRole::Edge(clouds) = &plan.role { clouds.len() } else { 0 };
            let report = status.map(|status| ProxyReport { gateway: plan.directory.own_pool.clone(), status, dials });
            self.report.send_if_modified(|have| replace(have, report));
            tokio::select! {
                changed = self.plans.changed() => if changed.is_err() { return },
                Ok(()) = identity.changed() => {}
                Ok(()) = problem.changed() => {}
                Ok(()) = established.changed() => {}
                Ok(()) = unreachable.changed() => {}
                _ = retry.tick() => {}
            }
        }
    }

    /// Starts missing parts and stops surplus ones; returns an error for each part that could not be started.
    async fn run_parts(&self, plan: &ProxyPlan, shared: &Shared, running: &mut BTreeMap<Part, Task>) -> Vec<String> {
        let parts = self.parts(plan, self.intercepted.is_some());
        running.retain(|part, task| parts.contains(part) && !task.0.is_finished());
        let mut failures = Vec::new();
        for part in parts {
            if running.contains_key(&part) {
                continue;
            }
            match self.start(part, shared).await {
                Ok(task) => drop(running.insert(part, Task(task))),
                Err(e) => failures.push(e),
            }
        }
        failures
    }

    async fn start(&self, part: Part, shared: &Shared) -> Result<JoinHandle<()>, String> {
        let (plan, stats, connections) = (shared.plan.subscribe(), self.stats.clone(), shared.connections.clone());
        Ok(match part {
            Part::EdgeListener(port) => {
                // On all addresses: sites dial the public one.
                let listener = listen(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)).await?;
                let edges = EdgeListener { plan, identity: shared.identity.subscribe(), connections, stats };
                tokio::spawn(edges.run(listener))
            }
            Part::Ingress(kind, address) => {
                let listener = listen(address).await?;
                tokio::spawn(Ingress(Router { plan, connections, stats }).run(listener, kind))
            }
            Part::Intercepted => {
                let listener = self
                    .intercepted
                    .as_ref()
                    .ok_or_else(|| "no listener for intercepted connections exists".to_owned())?;
                // The program hands connections to this socket, so its handle is duplicated.
                let handle = listener.try_clone().and_then(TcpListener::from_std);
                let listener =
                    handle.map_err(|e| format!("cannot use the listener for intercepted connections: {e}"))?;
                tokio::spawn(Ingress(Router { plan, connections, stats }).run(listener, Kind::Intercepted))
            }
            Part::Dialler => {
                let (clouds, identity) = (shared.clouds.subscribe(), shared.identity.subscribe());
                let server = EdgeServer { plan, stats, liveness: self.settings.liveness };
                tokio::spawn(dial::run(clouds, identity, server, shared.established.clone()))
            }
            Part::Siblings => tokio::spawn(siblings::run(shared.siblings.subscribe(), shared.unreachable.clone())),
        })
    }

    fn parts(&self, plan: &ProxyPlan, intercepted: bool) -> Vec<Part> {
        // `:PORT` means the node's own address, as in OpenYurt's Raven, which is also the Service's endpoint. A gateway
        // node may have a public address, and a kubelet's read-only port has no authentication.
        let own = plan.directory.address_of(&self.settings.node).filter(|own| is_here(*own));
        let here = |address: SocketAddr, port: u16| match (address.ip(), own) {
            (ip, Some(own)) if ip == Ipv6Addr::UNSPECIFIED => SocketAddr::new(own, port),
            (ip, _) => SocketAddr::new(ip, port),
        };
        match &plan.role {
            ProxyRole::None => Vec::new(),
            ProxyRole::Edge(_) => vec![Part::Dialler],
            ProxyRole::Cloud { port, .. } => {
                let secure = plan.directory.ports.https.iter().map(|port| {
                    let listener =
                        if *port == KUBELET_PORT { self.settings.secure.port() } else { secure_listener(*port) };
                    Part::Ingress(Kind::Named(ByName::Tls(*port)), here(self.settings.secure, listener))
                });
                let insecure = Part::Ingress(
                    Kind::Named(ByName::Plain),
                    here(self.settings.insecure, self.settings.insecure.port()),
                );
                [Part::EdgeListener(*port), insecure, Part::Siblings]
                    .into_iter()
                    .chain(intercepted.then_some(Part::Intercepted))
                    .chain(secure)
                    .collect()
            }
        }
    }
}

/// True if this machine has the address. The Node's InternalIP may belong to a router in front of it (`--node-ip`).
fn is_here(address: IpAddr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

async fn listen(address: SocketAddr) -> Result<TcpListener, String> {
    let bound = match TcpListener::bind(address).await {
        // A kernel without IPv6 refuses `[::]`; then all IPv4 addresses are used.
        Err(_) if address.ip().is_unspecified() && address.is_ipv6() => {
            TcpListener::bind(("0.0.0.0", address.port())).await
        }
        bound => bound,
    };
    bound.map_err(|e| {
        format!("cannot listen on TCP port {}: {e}; find the program that uses it with `ss -ltnp`", address.port())
    })
}

/// Channels and state that connect the parts. Each has one writer.
struct Shared {
    /// Written by [`Proxy::run`].
    plan: watch::Sender<Arc<ProxyPlan>>,
    /// The purpose of the certificate. Written by [`Proxy::run`], read by the enrolment.
    wanted: watch::Sender<Wanted>,
    /// Written by the enrolment.
    identity: watch::Sender<Option<Arc<Identity>>>,
    /// Why there is no identity. Written by the enrolment.
    problem: watch::Sender<Option<String>>,
    /// Cloud nodes to dial. Written by [`Proxy::run`], read by the dialler.
    clouds: watch::Sender<dial::Clouds>,
    /// Written by the dialler.
    established: watch::Sender<dial::Established>,
    /// The other proxies of the pool. Written by [`Proxy::run`], read by the task that checks them.
    siblings: watch::Sender<Siblings>,
    /// Those that accept no connection. Written by that task.
    unreachable: watch::Sender<BTreeSet<String>>,
    connections: Connections,
}

impl Shared {
    fn new(stats: Stats, liveness: Liveness) -> Self {
        Self {
            plan: watch::Sender::default(),
            wanted: watch::Sender::default(),
            identity: watch::Sender::default(),
            problem: watch::Sender::default(),
            clouds: watch::Sender::default(),
            established: watch::Sender::default(),
            siblings: watch::Sender::default(),
            unreachable: watch::Sender::default(),
            connections: Connections::new(stats, liveness),
        }
    }

    /// `port`: where proxies accept plain requests, which is the same on each node, because the Service targets it.
    fn publish(&self, plan: &Arc<ProxyPlan>, port: u16) {
        self.wanted.send_if_modified(|have| replace(have, (purpose(plan), plan.ca.clone())));
        self.plan.send_if_modified(|have| replace(have, plan.clone()));
        match &plan.role {
            ProxyRole::None => {}
            ProxyRole::Cloud { siblings, .. } => {
                let at = |(node, address): (&String, &IpAddr)| (node.clone(), SocketAddr::new(*address, port));
                self.siblings.send_if_modified(|have| replace(have, siblings.iter().map(at).collect()));
            }
            ProxyRole::Edge(clouds) => drop(self.clouds.send_if_modified(|have| replace(have, clouds.clone()))),
        }
    }
}

fn replace<T: PartialEq>(have: &mut T, want: T) -> bool {
    let changed = *have != want;
    if changed {
        *have = want;
    }
    changed
}

fn purpose(plan: &ProxyPlan) -> Purpose {
    match &plan.role {
        ProxyRole::None => Purpose::None,
        ProxyRole::Edge(_) => Purpose::Client(plan.uid.clone()),
        ProxyRole::Cloud { names, .. } => Purpose::Server(names.clone()),
    }
}

fn status(
    role: &ProxyRole,
    ready: bool,
    established: &dial::Established,
    unreachable: &BTreeSet<String>,
    failures: Vec<String>,
) -> Option<ProxyStatus> {
    let mut status = ProxyStatus { ready, ..ProxyStatus::default() };
    let summary = match role {
        ProxyRole::None => return None,
        // Edges publish their connections themselves. A list here would be sent to every watcher at each change.
        ProxyRole::Cloud { siblings, .. } => {
            // After an election, the set may still have nodes that were elected earlier.
            status.unreachable = unreachable.iter().filter(|node| siblings.contains_key(*node)).cloned().collect();
            match (ready, status.unreachable.as_slice()) {
                (false, _) => "the proxy is not ready".to_owned(),
                (true, []) => {
                    "accepts proxy connections and requests; GET /connections on the metrics port lists the connections"
                        .to_owned()
                }
                (true, lost) => format!("the proxies of these nodes do not accept connections: {}", lost.join(", ")),
            }
        }
        ProxyRole::Edge(clouds) => {
            status.ready = !established.is_empty();
            status.tunnels = established.keys().cloned().collect();
            let missing: Vec<&str> =
                clouds.keys().filter(|cloud| !established.contains_key(*cloud)).map(String::as_str).collect();
            match (clouds.is_empty(), missing.as_slice()) {
                (true, _) => "no exposed Gateway has an elected proxy node that can be dialled".to_owned(),
                (false, []) => "connected to every cloud gateway node".to_owned(),
                (false, missing) => format!("no proxy connection to {}", missing.join(", ")),
            }
        }
    };
    status.message = failures.into_iter().chain([summary]).collect::<Vec<_>>().join("; ");
    Some(status)
}

/// A task that is aborted on drop.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;
