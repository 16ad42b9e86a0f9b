//! Notices at once when another program deletes Raven's table or a part of it, as `nft flush ruleset` does at each restart
//! of nftables.service.

use std::{io, time::Duration};

use futures::{Stream, StreamExt, TryFutureExt, TryStreamExt, future::ready, stream};
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{NetlinkBuffer, NlasIterator},
    sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_NETFILTER},
};
use tokio::time::{Instant, sleep_until};

use crate::names;

/// Group of nftables' notifications: NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h.
const GROUP: u32 = 7;
/// NFNL_SUBSYS_NFTABLES, the upper byte of the message type.
const SUBSYSTEM: u16 = 10 << 8;
/// NFT_MSG_DELTABLE, DELCHAIN, DELRULE, DELSET and DELSETELEM of linux/netfilter/nf_tables.h.
const DELETIONS: [u16; 5] = [2, 5, 8, 11, 14];
/// Number of the attribute with the name of the table, in all of these messages (NFTA_TABLE_NAME and others).
const TABLE_NAME: u16 = 1;
/// Length of the family's header (struct nfgenmsg).
const HEADER: usize = 4;
/// Minimum time between two results: each leads to a run, which may change the table itself.
const PAUSE: Duration = Duration::from_secs(2);
/// Bytes of a buffer for notifications; the kernel sends up to a page at once.
const BUFFER: usize = 32 << 10;

/// Yields at each deletion, also by Raven, and when notifications were lost. Ends after an error, which is logged.
pub fn deletions() -> impl Stream<Item = ()> + Unpin + Send {
    let opened = open().map(|socket| (socket, Vec::with_capacity(BUFFER), Instant::now()));
    let found = ready(opened).map_ok(|state| stream::try_unfold(state, next)).try_flatten_stream();
    let logged = found.inspect_err(
        |e| tracing::warn!(error = %e, "cannot watch nftables; a deleted table is noticed within half a minute"),
    );
    Box::pin(logged.filter_map(|found| ready(found.ok())))
}

fn open() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    socket.socket_mut().add_membership(GROUP)?;
    Ok(socket)
}

/// The socket, a buffer, and the earliest time of the next result.
type State = (TokioSocket, Vec<u8>, Instant);

/// Another program may change many rules, so messages are read one by one into a fixed buffer.
async fn next((socket, mut buffer, earliest): State) -> io::Result<Option<((), State)>> {
    loop {
        buffer.clear();
        match socket.recv(&mut buffer).await {
            Ok(()) if !contains_deletion(&buffer) => {}
            Err(e) if e.raw_os_error() != Some(Errno::ENOBUFS as i32) => return Err(e),
            _ => {
                sleep_until(earliest).await;
                return Ok(Some(((), (socket, buffer, Instant::now() + PAUSE))));
            }
        }
    }
}

/// True if one of the messages is about a deletion in Raven's table.
fn contains_deletion(mut messages: &[u8]) -> bool {
    while let Ok(message) = NetlinkBuffer::new_checked(messages) {
        let deletes = message.message_type().checked_sub(SUBSYSTEM).is_some_and(|kind| DELETIONS.contains(&kind));
        if deletes && is_ours(message.payload()) {
            return true;
        }
        let length = (message.length() as usize).next_multiple_of(4);
        messages = messages.get(length..).unwrap_or_default();
    }
    false
}

/// True if the message names Raven's table.
fn is_ours(payload: &[u8]) -> bool {
    let attributes = NlasIterator::new(payload.get(HEADER..).unwrap_or_default());
    attributes.map_while(Result::ok).any(|attribute| {
        attribute.kind() == TABLE_NAME && attribute.value().strip_suffix(&[0]) == Some(names::NFT_TABLE.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A notification about a table: header (length, type, flags, sequence, port), family's header, name, handle.
    fn message(kind: u16, table: &str) -> Vec<u8> {
        let mut body = vec![1, 0, 0, 0, 12, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 9];
        body.extend(u16::try_from(table.len() + 5).expect("short").to_ne_bytes());
        body.extend([1, 0]);
        body.extend(table.bytes().chain([0]));
        let mut bytes = u32::try_from(body.len() + 16).expect("short").to_ne_bytes().to_vec();
        bytes.extend((SUBSYSTEM + kind).to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn deletions_in_the_own_table_are_noticed() {
        assert!(contains_deletion(&message(2, "raven")));
        let both = [message(2, "kube-proxy"), message(8, "raven")].concat();
        assert!(contains_deletion(&both), "the second message");
        assert!(!contains_deletion(&message(0, "raven")), "an addition");
        assert!(!contains_deletion(&[message(2, "kube-proxy"), message(2, "ravens")].concat()), "other tables");
        for length in 0..both.len() - 8 {
            contains_deletion(&both[..length]);
        }
        assert!(!contains_deletion(&[0; 64]), "messages without a length end the search");
    }
}
