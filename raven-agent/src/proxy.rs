//! The L7 half: requests of the cloud side for kubelets at sites that nobody can dial, through tunnels that the sites open.
//!
//! In the order of a request: [`entrance`] takes it on a cloud gateway node ([`hello`] reads the name in a ClientHello, [`http`] a Host
//! header); [`plan`] says which node is meant; [`tunnels`] opens a stream to its site; there [`serve`] connects to the node; [`stream`]
//! carries the bytes. TLS is passed on, never opened. Tunnels: [`dial`] at the edge, [`accept`] in the cloud, [`identity`] and [`enrol`]
//! prove who is who. [`limits`] has every window, limit and time; [`stats`] counts.
//!
//! Runs beside L3 and without it: what it needs of the node is a TCP port.

mod accept;
mod dial;
mod enrol;
mod entrance;
pub mod hello;
mod http;
mod identity;
mod limits;
pub mod plan;
mod serve;
mod sever;
pub mod stats;
mod stream;
mod tunnels;
mod waiting;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
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

use crate::observe::Proxied;

use self::{
    accept::Gate,
    enrol::{Keeper, Purpose, Wanted},
    entrance::{Entrance, Kind},
    identity::Identity,
    plan::{Plan, Role},
    serve::Edge,
    stats::Stats,
    tunnels::Tunnels,
};

/// How often is tried again to listen on a port that was taken.
const AGAIN: Duration = Duration::from_secs(5);

/// What stays the same for the life of the process.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Folder for keys and certificates.
    pub state: PathBuf,
    /// Where requests over TLS to the kubelets' port come in.
    pub secure: SocketAddr,
    /// Where requests in plain HTTP come in.
    pub insecure: SocketAddr,
}

/// What the proxy goes by: its plan, and the CA's certificates.
pub type Orders = (Arc<Plan>, String);

/// The L7 half of this node.
pub struct Proxy {
    settings: Settings,
    client: Option<Client>,
    orders: watch::Receiver<Orders>,
    status: watch::Sender<Option<Proxied>>,
    stats: Stats,
    dialled: Option<std::net::TcpListener>,
}

/// A listener for connections to other nodes' addresses, which routing and the program `kubelet_lookup` bring here. Transparent, so that
/// the answers may have these addresses (ip(7), IP_TRANSPARENT; needs CAP_NET_ADMIN). Nobody else reaches it: it is on loopback.
pub fn listen_transparently() -> std::io::Result<std::net::TcpListener> {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_ip_transparent_v4(true)?;
    // What it accepts has the port that was dialled for its own, and this: or the node's own kubelet could not listen there again after a
    // restart, for as long as a connection to another node's lives, or is remembered (EADDRINUSE).
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// What is listened to, or done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Gate(u16),
    /// By name, at this address.
    Entrance(Kind, SocketAddr),
    /// By address: the one listener that the program hands connections to.
    Dialled,
    Dialler,
}

impl Proxy {
    /// A proxy that follows `orders`. `client`: none offline, where certificates are those on the disk. `dialled`: from
    /// [`listen_transparently`].
    pub fn new(
        settings: Settings,
        client: Option<Client>,
        orders: watch::Receiver<Orders>,
        status: watch::Sender<Option<Proxied>>,
        stats: Stats,
        dialled: Option<std::net::TcpListener>,
    ) -> Self {
        Self { settings, client, orders, status, stats, dialled }
    }

    /// Runs until the task is dropped.
    pub async fn run(mut self) {
        let wires = Wires::new(self.stats.clone());
        let keeper = Keeper {
            node: self.settings.node.clone(),
            client: self.client.clone(),
            state: self.settings.state.clone(),
            wanted: wires.wanted.subscribe(),
            identity: wires.identity.clone(),
            problem: wires.problem.clone(),
        };
        let _keeper = Task(tokio::spawn(keeper.run()));
        let mut running: BTreeMap<Part, Task> = BTreeMap::new();
        let (mut identity, mut problem) = (wires.identity.subscribe(), wires.problem.subscribe());
        let mut up = wires.up.subscribe();
        let mut again = interval(AGAIN);
        loop {
            let (plan, ca) = self.orders.borrow_and_update().clone();
            wires.tell(&plan, ca);
            let mut failures = self.run_parts(&plan, &wires, &mut running).await;
            failures.extend(problem.borrow_and_update().clone());
            // Whoever is sent here by the Service finds every port; by address is L3's neighbour, and said by it.
            let needed = self.parts(&plan, false);
            let ready = identity.borrow_and_update().is_some() && needed.iter().all(|part| running.contains_key(part));
            let status = status(&plan.role, ready, &up.borrow_and_update(), failures);
            let dials = if let Role::Edge(clouds) = &plan.role { clouds.len() } else { 0 };
            let status = status.map(|status| Proxied { gateway: plan.directory.own_pool.clone(), status, dials });
            self.status.send_if_modified(|have| replace(have, status));
            tokio::select! {
                changed = self.orders.changed() => if changed.is_err() { return },
                Ok(()) = identity.changed() => {}
                Ok(()) = problem.changed() => {}
                Ok(()) = up.changed() => {}
                _ = again.tick() => {}
            }
        }
    }

    /// Starts what should run and does not, ends what should not; gives what could not be started.
    async fn run_parts(&self, plan: &Plan, wires: &Wires, running: &mut BTreeMap<Part, Task>) -> Vec<String> {
        let parts = self.parts(plan, self.dialled.is_some());
        running.retain(|part, task| parts.contains(part) && !task.0.is_finished());
        let mut failures = Vec::new();
        for part in parts {
            if running.contains_key(&part) {
                continue;
            }
            match self.start(part, wires).await {
                Ok(task) => drop(running.insert(part, Task(task))),
                Err(e) => failures.push(e),
            }
        }
        failures
    }

    async fn start(&self, part: Part, wires: &Wires) -> Result<JoinHandle<()>, String> {
        let (plan, stats) = (wires.plan.subscribe(), self.stats.clone());
        Ok(match part {
            Part::Gate(port) => {
                // From everywhere: this is what sites dial.
                let listener = listen(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)).await?;
                let gate = Gate { plan, identity: wires.identity.subscribe(), tunnels: wires.tunnels.clone(), stats };
                tokio::spawn(gate.run(listener))
            }
            Part::Entrance(kind, address) => {
                let listener = listen(address).await?;
                tokio::spawn(Entrance { plan, tunnels: wires.tunnels.clone(), stats }.run(listener, kind))
            }
            Part::Dialled => {
                let listener = self.dialled.as_ref().ok_or_else(|| "there is no listener for connections by address".to_owned())?;
                // Another handle of the same socket: it is the one that the program hands connections to.
                let handle = listener.try_clone().and_then(TcpListener::from_std);
                let listener = handle.map_err(|e| format!("use the listener for connections by address: {e}"))?;
                tokio::spawn(Entrance { plan, tunnels: wires.tunnels.clone(), stats }.run(listener, Kind::Dialled))
            }
            Part::Dialler => {
                let (clouds, identity) = (wires.clouds.subscribe(), wires.identity.subscribe());
                tokio::spawn(dial::run(clouds, identity, Edge { plan, stats }, wires.up.clone()))
            }
        })
    }

    fn parts(&self, plan: &Plan, dialled: bool) -> Vec<Part> {
        // `:PORT` is the node's own address, as upstream has it: what the Service's endpoints are. A gateway node may be on the internet,
        // and a kubelet's read-only port asks nobody who he is.
        let own = plan.directory.address_of(&self.settings.node).filter(|own| is_here(*own));
        let here = |address: SocketAddr, port: u16| match (address.ip(), own) {
            (ip, Some(own)) if ip == Ipv6Addr::UNSPECIFIED => SocketAddr::new(own, port),
            (ip, _) => SocketAddr::new(ip, port),
        };
        match &plan.role {
            Role::None => Vec::new(),
            Role::Edge(_) => vec![Part::Dialler],
            Role::Cloud { port, .. } => {
                let secure = plan.directory.ports.https.iter().map(|port| {
                    let listener = if *port == KUBELET_PORT { self.settings.secure.port() } else { secure_listener(*port) };
                    Part::Entrance(Kind::Secure(*port), here(self.settings.secure, listener))
                });
                let insecure = Part::Entrance(Kind::Insecure, here(self.settings.insecure, self.settings.insecure.port()));
                [Part::Gate(*port), insecure].into_iter().chain(dialled.then_some(Part::Dialled)).chain(secure).collect()
            }
        }
    }
}

/// Whether this machine has the address; the Node's InternalIP may be on a box in front of it (`--node-ip`).
fn is_here(address: IpAddr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

async fn listen(address: SocketAddr) -> Result<TcpListener, String> {
    let bound = match TcpListener::bind(address).await {
        // `[::]` needs IPv6 in the kernel; without it, all of IPv4.
        Err(_) if address.ip().is_unspecified() && address.is_ipv6() => TcpListener::bind(("0.0.0.0", address.port())).await,
        bound => bound,
    };
    bound.map_err(|e| format!("listen on TCP port {}: {e} (does another program use it? `ss -ltnp`)", address.port()))
}

/// What joins the parts: each is written in one place and followed in others.
struct Wires {
    plan: watch::Sender<Arc<Plan>>,
    /// What a certificate is needed for; the keeper follows it …
    wanted: watch::Sender<Wanted>,
    /// … and writes these two.
    identity: watch::Sender<Option<Arc<Identity>>>,
    problem: watch::Sender<Option<String>>,
    /// Whom the dialler dials, and who is up.
    clouds: watch::Sender<dial::Clouds>,
    up: watch::Sender<dial::Up>,
    tunnels: Tunnels,
}

impl Wires {
    fn new(stats: Stats) -> Self {
        Self {
            plan: watch::Sender::default(),
            wanted: watch::Sender::default(),
            identity: watch::Sender::default(),
            problem: watch::Sender::default(),
            clouds: watch::Sender::default(),
            up: watch::Sender::default(),
            tunnels: Tunnels::new(stats),
        }
    }

    fn tell(&self, plan: &Arc<Plan>, ca: String) {
        self.wanted.send_if_modified(|have| replace(have, (purpose(plan), ca)));
        self.plan.send_if_modified(|have| replace(have, plan.clone()));
        match &plan.role {
            Role::Edge(clouds) => drop(self.clouds.send_if_modified(|have| replace(have, clouds.clone()))),
            Role::None | Role::Cloud { .. } => {}
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

fn purpose(plan: &Plan) -> Purpose {
    match &plan.role {
        Role::None => Purpose::None,
        Role::Edge(_) => Purpose::Client(plan.uid.clone()),
        Role::Cloud { names, .. } => Purpose::Server(names.clone()),
    }
}

fn status(role: &Role, ready: bool, up: &dial::Up, failures: Vec<String>) -> Option<ProxyStatus> {
    let (tunnels, ready, words): (Vec<String>, bool, String) = match role {
        Role::None => return None,
        Role::Cloud { .. } => {
            // Who has a tunnel here says so itself; a list of them all, at each change of one, would go to everybody who watches.
            let words = if ready { "takes tunnels and requests; who has a tunnel here: /tunnels on the metrics port" } else { "not ready" };
            (Vec::new(), ready, words.to_owned())
        }
        Role::Edge(clouds) => {
            let missing: Vec<&str> = clouds.keys().filter(|cloud| !up.contains_key(*cloud)).map(String::as_str).collect();
            let words = match (clouds.is_empty(), missing.as_slice()) {
                (true, _) => "no exposed Gateway has an elected proxy node, so there is nobody to dial".to_owned(),
                (false, []) => "a tunnel to every cloud gateway node".to_owned(),
                (false, missing) => format!("no tunnel to {}", missing.join(", ")),
            };
            (up.keys().cloned().collect(), !up.is_empty(), words)
        }
    };
    let message = failures.into_iter().chain([words]).collect::<Vec<_>>().join("; ");
    Some(ProxyStatus { ready, message, tunnels })
}

/// Ends with the value.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;
