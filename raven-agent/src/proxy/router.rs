//! Opens a byte stream to a target node: through a proxy connection of its pool, or directly within this node's own pool.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
};

use super::{
    connections::{Connections, Opened},
    serve::dial,
    stats::{Refusal, Stats},
    stream::Stream,
};
use crate::plan::proxy::{NotFound, ProxyPlan, Target};

/// The state that routes requests; clones share it.
#[derive(Clone)]
pub(crate) struct Router {
    pub(crate) plan: watch::Receiver<Arc<ProxyPlan>>,
    pub(crate) connections: Connections,
    pub(crate) stats: Stats,
}

/// An open path to a node.
pub(crate) enum NodeStream {
    Direct(TcpStream),
    Proxied(Opened),
}

impl Router {
    /// Opens a client's path to a node. Fails with the reason of the refusal and a message for the client.
    pub(crate) async fn open(
        &self,
        target: &Target,
        stream: &Stream,
        client: IpAddr,
    ) -> Result<NodeStream, (Refusal, String)> {
        let own = {
            let directory = &self.plan.borrow().directory;
            (directory.own_pool == target.pool).then(|| directory.reached_at(target))
        };
        if let Some(address) = own {
            let address = SocketAddr::new(address, stream.port);
            return dial(&target.node, address).await.map(NodeStream::Direct).map_err(|e| (Refusal::Unreachable, e));
        }
        self.connections
            .open(target, stream, client)
            .await
            .map(NodeStream::Proxied)
            .map_err(|e| (e.refusal(), e.to_string()))
    }
}

/// The counter of a failed lookup.
pub(super) fn refusal_of(error: &NotFound) -> Refusal {
    match error {
        NotFound::Name(_) | NotFound::Address(_) => Refusal::Unknown,
        NotFound::Ambiguous { .. } => Refusal::Ambiguous,
        NotFound::Port(_) => Refusal::Port,
    }
}

/// A bidirectional byte stream.
pub(super) trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

impl NodeStream {
    pub(super) fn into_io(self) -> Box<dyn Bytes> {
        match self {
            Self::Direct(stream) => Box::new(stream),
            Self::Proxied(opened) => Box::new(opened),
        }
    }
}
