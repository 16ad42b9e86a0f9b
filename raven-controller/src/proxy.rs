//! The controller's part of the L7 half: certificates for the tunnels' ends, and what leads clients to the cloud gateway nodes.
//!
//! [`follow`] keeps what is needed of the API server's objects. [`sign`] says, purely, which certificate requests are granted, [`ca`] is the
//! authority that signs, [`grant`] does it. [`services`] and [`dns`] say, purely, which Services, EndpointSlices and host names there
//! should be, and [`publish`] writes them.

pub mod ca;
pub mod dns;
pub mod follow;
pub mod grant;
pub mod publish;
pub mod services;
pub mod sign;
