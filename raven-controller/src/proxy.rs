//! The controller's part of the L7 half: certificates for proxies, and the Services and host names that route clients
//! to cloud gateway nodes.
//!
//! - [`policy`] decides which certificate requests are granted; [`signer`] answers them with the
//!   CAs of [`authorities`].
//! - [`services`] and [`dns`] compute the desired Services, EndpointSlices and host names; [`publish`] writes them.

pub(crate) mod authorities;
pub(crate) mod dns;
pub(crate) mod policy;
pub(crate) mod publish;
pub(crate) mod services;
pub(crate) mod signer;
