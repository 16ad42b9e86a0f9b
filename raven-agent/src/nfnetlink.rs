//! Requests to netfilter's netlink family (linux/netfilter/nfnetlink.h), for what nft does not do.

use std::io;

use futures::StreamExt;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload},
    proto::{ConnectionHandle, new_connection},
    sys::{SocketAddr, protocols::NETLINK_NETFILTER},
};

/// A socket of the family.
pub(crate) struct Nfnetlink(ConnectionHandle<NetfilterMessage>);

impl Nfnetlink {
    /// Opens a socket. It is closed when the value is dropped.
    pub(crate) fn connect() -> io::Result<Self> {
        let (connection, handle, _) = new_connection(NETLINK_NETFILTER)?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Sends a request and waits until it is acknowledged.
    pub(crate) async fn change(
        &self,
        family: NetfilterProtoFamily,
        request: impl Into<NetfilterMessageInner>,
    ) -> io::Result<()> {
        self.ask(family, request.into(), NLM_F_REQUEST | NLM_F_ACK, drop).await
    }

    /// Lists objects; `each` receives them one by one, because there may be hundreds of thousands.
    pub(crate) async fn list(
        &self,
        request: impl Into<NetfilterMessageInner>,
        each: impl FnMut(NetfilterMessageInner),
    ) -> io::Result<()> {
        self.ask(NetfilterProtoFamily::Unspec, request.into(), NLM_F_REQUEST | NLM_F_DUMP, each).await
    }

    async fn ask(
        &self,
        family: NetfilterProtoFamily,
        request: NetfilterMessageInner,
        flags: u16,
        mut each: impl FnMut(NetfilterMessageInner),
    ) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), request);
        let message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        let mut answers = self.0.clone().request(message, SocketAddr::new(0, 0)).map_err(io::Error::other)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => each(message.inner),
                NetlinkPayload::Error(e) if e.code.is_some() => return Err(e.to_io()),
                _ => {}
            }
        }
        Ok(())
    }
}
