//! Aggregates of packets, as Linux exchanges them with a TUN device that has a virtio header.
//!
//! [`split`] makes packets of an aggregate, [`Coalescer`] aggregates of packets. What one joins, the other divides into
//! the same packets; only the identification of IPv4 packets that must not be fragmented is not preserved.

mod checksum;
mod coalesce;
mod packet;
mod segment;
mod virtio;

pub(crate) use self::packet::{addresses, stated_length};
pub use self::{
    coalesce::Coalescer,
    segment::{Malformed, split},
    virtio::{Checksum, Header, Kind, LENGTH},
};

#[cfg(test)]
mod tests;
