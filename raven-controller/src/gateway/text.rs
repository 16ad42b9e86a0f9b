//! Helpers for messages of conditions and Events.

use std::fmt::Display;

use raven_api::gateway::EndpointType;

/// Maximum number of list items in a message. A pool may have thousands of nodes, and the size of an API
/// object is limited.
pub(crate) const MAX_ITEMS: usize = 5;

/// Lists the first [`MAX_ITEMS`] names and the number of omitted ones.
pub(crate) fn enumerate<T: Display>(names: &[T]) -> String {
    let shown: Vec<String> = names.iter().take(MAX_ITEMS).map(ToString::to_string).collect();
    match names.len().saturating_sub(MAX_ITEMS) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Joins the first [`MAX_ITEMS`] messages and adds the number of omitted ones.
pub(crate) fn join_capped(messages: &[&str], separator: &str) -> String {
    let shown = messages[..messages.len().min(MAX_ITEMS)].join(separator);
    match messages.len().saturating_sub(MAX_ITEMS) {
        0 => shown,
        more => format!("{shown}{separator}and {more} more"),
    }
}

/// Formats a count with its noun in singular or plural.
pub(crate) fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

/// Returns the value of the API's `type` field: `tunnel` or `proxy`.
pub(crate) fn type_name(type_: EndpointType) -> &'static str {
    match type_ {
        EndpointType::Tunnel => "tunnel",
        EndpointType::Proxy => "proxy",
    }
}
