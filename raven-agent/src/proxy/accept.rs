//! The cloud's side: takes the tunnels that edges dial. Who is at the other end is what its certificate says, and whether it may bring a
//! tunnel, and for which pool, is what the topology says: a node that is deleted, or not elected any more, loses its tunnel.

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    identity::{self, Identity},
    limits,
    plan::Plan,
    stats::{Refusal, Stats},
    stream,
    tunnels::Tunnels,
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
        let handshakes = Arc::new(Semaphore::new(limits::HANDSHAKES));
        let mut acceptor = self.acceptor();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((connection, from)) => {
                        let (Ok(place), Some(acceptor)) = (handshakes.clone().try_acquire_owned(), acceptor.clone()) else {
                            self.stats.refused(Refusal::TooMany);
                            continue;
                        };
                        let (plan, tunnels, stats) = (self.plan.clone(), self.tunnels.clone(), self.stats.clone());
                        tokio::spawn(async move {
                            match timeout(limits::HANDSHAKE, admit(connection, acceptor, &plan)).await {
                                Ok(Ok((tunnel, node, pool))) => {
                                    drop(place);
                                    // What became of it is said there.
                                    let _ = tunnels.take(&node, &pool, tunnel).await;
                                }
                                Ok(Err((refusal, why))) => turn_away(&stats, from, refusal, &why),
                                Err(_) => turn_away(&stats, from, Refusal::Slow, "no TLS handshake in time"),
                            }
                        });
                    }
                    Err(e) => {
                        tracing::warn!("accept a tunnel: {e}");
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                },
                Ok(()) = self.identity.changed() => acceptor = self.acceptor(),
                Ok(()) = self.plan.changed() => {
                    let plan = self.plan.borrow_and_update().clone();
                    self.tunnels.retain(|node, pool| plan.directory.pool_of_proxy(node) == Some(pool));
                }
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

fn turn_away(stats: &Stats, from: SocketAddr, refusal: Refusal, why: &str) {
    stats.refused(refusal);
    tracing::warn!(%from, ?refusal, "no tunnel: {why}");
}

async fn admit(
    connection: TcpStream,
    acceptor: TlsAcceptor,
    plan: &watch::Receiver<Arc<Plan>>,
) -> Result<(TlsStream<TcpStream>, String, String), (Refusal, String)> {
    stream::prepare_tunnel(&connection);
    let tunnel = acceptor.accept(connection).await.map_err(|e| (Refusal::Unauthenticated, format!("TLS: {e}")))?;
    let certificate = tunnel.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let certificate = certificate.ok_or_else(|| (Refusal::Unauthenticated, "it shows no certificate".to_owned()))?;
    let node = identity::node_of(certificate).map_err(|e| (Refusal::Unauthenticated, e.to_string()))?;
    let pool = plan.borrow().directory.pool_of_proxy(&node).map(str::to_owned);
    match pool {
        Some(pool) => Ok((tunnel, node, pool)),
        None => Err((Refusal::NotElected, format!("node {node} is no elected proxy node of an edge Gateway"))),
    }
}
