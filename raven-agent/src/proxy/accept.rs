//! The cloud's side: takes the tunnels that edges dial. Who is at the other end is what its certificate says, and whether it may bring a
//! tunnel, and for which pool, is what the topology says: a node that is deleted, or not elected any more, loses its tunnel.

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    identity::{self, Identity},
    limits,
    plan::{Bearer, Plan},
    stats::{Refusal, Stats},
    stream,
    tunnels::Tunnels,
    waiting::{Place, Waiting},
};

/// Takes tunnels until the task is dropped.
pub(crate) struct Gate {
    pub(crate) plan: watch::Receiver<Arc<Plan>>,
    pub(crate) identity: watch::Receiver<Option<Arc<Identity>>>,
    pub(crate) tunnels: Tunnels,
    pub(crate) stats: Stats,
}

impl Gate {
    pub(crate) async fn run(mut self, listener: TcpListener) {
        let waiting = Waiting::new(limits::HANDSHAKES);
        // With this task they all end: connections of a gate that is closed are nobody's.
        let mut connections = JoinSet::new();
        let mut acceptor = self.acceptor();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((connection, from)) => {
                        let Some(acceptor) = acceptor.clone() else { continue };
                        let (place, crowded) = waiting.enter();
                        if crowded && self.stats.refused(Refusal::TooMany) {
                            tracing::warn!(%from, "too many connections that have not said who they are: the oldest goes");
                        }
                        let visitor = Visitor { from, plan: self.plan.clone(), tunnels: self.tunnels.clone(), stats: self.stats.clone() };
                        connections.spawn(visitor.enter(connection, acceptor, place));
                    }
                    Err(e) => {
                        tracing::warn!("accept a tunnel: {e}");
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                },
                Ok(()) = self.identity.changed() => acceptor = self.acceptor(),
                Ok(()) = self.plan.changed() => {
                    let plan = self.plan.borrow_and_update().clone();
                    self.tunnels.retain(|bearer, pool| plan.directory.pool_of_proxy(bearer) == Some(pool));
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }

    fn acceptor(&mut self) -> Option<TlsAcceptor> {
        let identity = self.identity.borrow_and_update().clone()?;
        match identity.server() {
            Ok(config) => Some(TlsAcceptor::from(config)),
            Err(e) => {
                tracing::error!("certificate of the proxy: {e}");
                None
            }
        }
    }
}

/// One who dials.
struct Visitor {
    from: SocketAddr,
    plan: watch::Receiver<Arc<Plan>>,
    tunnels: Tunnels,
    stats: Stats,
}

impl Visitor {
    async fn enter(self, connection: TcpStream, acceptor: TlsAcceptor, place: Place) {
        let admitted = tokio::select! {
            admitted = timeout(limits::HANDSHAKE, admit(connection, acceptor, &self.plan)) => admitted,
            // Counted when its place was given away.
            () = place.over.cancelled() => return,
        };
        drop(place);
        match admitted {
            Ok(Ok((tunnel, bearer, pool))) => {
                // What became of it is said there. The election may have changed since it was looked at.
                let _ = self
                    .tunnels
                    .take(bearer, &pool, tunnel, |bearer, pool| self.plan.borrow().directory.pool_of_proxy(bearer) == Some(pool))
                    .await;
            }
            Ok(Err((refusal, why))) => self.turn_away(refusal, &why),
            Err(_) => self.turn_away(Refusal::Slow, "no TLS handshake in time"),
        }
    }

    fn turn_away(&self, refusal: Refusal, why: &str) {
        if self.stats.refused(refusal) {
            tracing::warn!(from = %self.from, ?refusal, "no tunnel: {why}");
        }
    }
}

async fn admit(
    connection: TcpStream,
    acceptor: TlsAcceptor,
    plan: &watch::Receiver<Arc<Plan>>,
) -> Result<(TlsStream<TcpStream>, Bearer, String), (Refusal, String)> {
    stream::prepare_tunnel(&connection);
    let tunnel = acceptor.accept(connection).await.map_err(|e| (Refusal::Unauthenticated, format!("TLS: {e}")))?;
    let certificate = tunnel.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let certificate = certificate.ok_or_else(|| (Refusal::Unauthenticated, "it shows no certificate".to_owned()))?;
    let bearer = identity::bearer_of(certificate).map_err(|e| (Refusal::Unauthenticated, e.to_string()))?;
    let pool = plan.borrow().directory.pool_of_proxy(&bearer).map(str::to_owned);
    match pool {
        Some(pool) => Ok((tunnel, bearer, pool)),
        None => {
            let uid = bearer.uid.as_deref().unwrap_or("none");
            Err((Refusal::NotElected, format!("node {} (UID {uid}) is no elected proxy node of an edge Gateway", bearer.node)))
        }
    }
}
