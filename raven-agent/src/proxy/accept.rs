//! The cloud's side of a proxy connection: accepts, authenticates and admits the connections that edges open.
//!
//! The certificate proves which node dials. The topology decides whether that node may connect, and for which pool. A
//! node that is deleted or no longer elected loses its connections.

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::Instrument;

use super::{
    connections::Connections,
    identity::{self, Identity},
    limits,
    liveness::Link,
    pending::{PendingSet, PendingSlot},
    stats::{Refusal, Stats},
};
use crate::plan::proxy::{EdgeIdentity, ProxyPlan};

/// Accepts proxy connections until the task is dropped.
pub(crate) struct EdgeListener {
    pub(crate) plan: watch::Receiver<Arc<ProxyPlan>>,
    pub(crate) identity: watch::Receiver<Option<Arc<Identity>>>,
    pub(crate) connections: Connections,
    pub(crate) stats: Stats,
}

impl EdgeListener {
    pub(crate) async fn run(mut self, listener: TcpListener) {
        let pending = PendingSet::new(limits::PENDING_EDGES);
        // All connections end with this task.
        let mut tasks = JoinSet::new();
        let mut acceptor = self.acceptor();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((tcp, from)) => {
                        let Some(acceptor) = acceptor.clone() else { continue };
                        let (slot, evicted) = pending.enter(from.ip());
                        if evicted && self.stats.refused(Refusal::TooMany) {
                            tracing::warn!(limit = limits::PENDING_EDGES, "too many pending proxy connections; evicted the oldest one of the address with most");
                        }
                        let span = tracing::info_span!("proxy_accept", %from);
                        let edge = Edge { plan: self.plan.clone(), connections: self.connections.clone(), stats: self.stats.clone() };
                        tasks.spawn(edge.enter(tcp, from, acceptor, slot).instrument(span));
                    }
                    Err(e) => {
                        tracing::warn!(error = %e, "cannot accept proxy connections; retrying");
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                },
                Ok(()) = self.identity.changed() => acceptor = self.acceptor(),
                Ok(()) = self.plan.changed() => {
                    let plan = self.plan.borrow_and_update().clone();
                    self.connections.retain(|edge, pool| plan.directory.pool_of_proxy(edge) == Some(pool));
                }
                Some(_) = tasks.join_next() => {}
            }
        }
    }

    fn acceptor(&mut self) -> Option<TlsAcceptor> {
        let identity = self.identity.borrow_and_update().clone()?;
        match identity.server() {
            Ok(config) => Some(TlsAcceptor::from(config)),
            Err(e) => {
                tracing::error!(error = %e, "cannot use the proxy's certificate; edges cannot connect");
                None
            }
        }
    }
}

/// An edge that dials.
struct Edge {
    plan: watch::Receiver<Arc<ProxyPlan>>,
    connections: Connections,
    stats: Stats,
}

impl Edge {
    async fn enter(self, tcp: TcpStream, from: SocketAddr, acceptor: TlsAcceptor, slot: PendingSlot) {
        let admitted = tokio::select! {
            admitted = timeout(limits::HANDSHAKE, admit(tcp, acceptor, &self.plan)) => admitted,
            // The eviction is counted already.
            () = slot.evicted.cancelled() => return,
        };
        drop(slot);
        match admitted {
            Ok(Ok(Admitted { tls, link, edge, pool })) => {
                // The election may have changed during the handshake, so the connection set checks it again.
                let may_connect =
                    |edge: &EdgeIdentity, pool: &str| self.plan.borrow().directory.pool_of_proxy(edge) == Some(pool);
                // Its end is logged there.
                let _ = self.connections.serve(edge, &pool, tls, link, may_connect).await;
            }
            Ok(Err((refusal, error))) => self.refuse(from, refusal, &error),
            Err(_) => self.refuse(from, Refusal::Slow, "the TLS handshake timed out"),
        }
    }

    fn refuse(&self, from: SocketAddr, refusal: Refusal, error: &str) {
        if self.stats.refused(refusal) {
            tracing::warn!(%from, reason = refusal.as_str(), error, "refused a proxy connection");
        }
    }
}

/// A connection of an elected edge.
struct Admitted {
    tls: TlsStream<TcpStream>,
    link: Link,
    edge: EdgeIdentity,
    pool: String,
}

async fn admit(
    tcp: TcpStream,
    acceptor: TlsAcceptor,
    plan: &watch::Receiver<Arc<ProxyPlan>>,
) -> Result<Admitted, (Refusal, String)> {
    let link = Link::new(&tcp).map_err(|e| (Refusal::TooMany, format!("cannot set up the socket: {e}")))?;
    let tls = acceptor.accept(tcp).await.map_err(|e| (Refusal::Unauthenticated, format!("TLS: {e}")))?;
    let certificate = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let certificate =
        certificate.ok_or_else(|| (Refusal::Unauthenticated, "the edge sent no certificate".to_owned()))?;
    let edge = identity::edge_of(certificate).map_err(|e| (Refusal::Unauthenticated, e.to_string()))?;
    let pool = plan.borrow().directory.pool_of_proxy(&edge).map(str::to_owned);
    match pool {
        Some(pool) => Ok(Admitted { tls, link, edge, pool }),
        None => {
            let uid = edge.uid.as_deref().unwrap_or("none");
            Err((
                Refusal::NotElected,
                format!("node {} (UID {uid}) is not an elected proxy node of an edge Gateway", edge.node),
            ))
        }
    }
}
