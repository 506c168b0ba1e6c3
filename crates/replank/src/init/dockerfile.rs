//! What a Dockerfile says about how its image runs: ports, health check, and whether it takes the version.

use super::health::{self, Check};

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dockerfile {
    /// TCP ports of `EXPOSE`, in order; those that depend on variables are left out.
    pub ports: Vec<u16>,
    pub check: Option<Check>,
    /// `ARG APP_VERSION`.
    pub takes_version: bool,
    /// It carries the label that says which records it reads: it is Replank.
    pub is_controller: bool,
}

/// Only the last stage runs; its base may say more, and is not read.
pub fn read(text: &str) -> Dockerfile {
    let mut found = Dockerfile::default();
    let mut takes_version = false;
    for line in instructions(text) {
        let mut words = line.split_whitespace();
        let instruction = words.next().unwrap_or_default().to_ascii_uppercase();
        let rest = line.get(instruction.len()..).unwrap_or_default().trim();
        match instruction.as_str() {
            "FROM" => found = Dockerfile::default(),
            "EXPOSE" => {
                found.ports.extend(words.filter_map(|w| w.strip_suffix("/tcp").unwrap_or(w).parse::<u16>().ok()))
            }
            "ARG" if words.any(|w| w.split('=').next() == Some("APP_VERSION")) => takes_version = true,
            "HEALTHCHECK" => {
                let command = rest.split_once("CMD").map(|(_, command)| command.trim());
                found.check = command.map(|command| match serde_json::from_str::<Vec<String>>(command) {
                    Ok(words) => health::of_words(&words),
                    Err(_) => health::of_shell(command),
                });
            }
            _ => {}
        }
    }
    found.takes_version = takes_version;
    found.is_controller = text.contains(replank_core::format::FORMATS_LABEL);
    found
}

/// Lines joined at their backslashes, without comments.
fn instructions(text: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('#') || (line.is_empty() && goes_on) {
            continue;
        }
        let (part, more) = line.strip_suffix('\\').map_or((line, false), |part| (part.trim_end(), true));
        match all.last_mut().filter(|_| goes_on) {
            Some(last) => {
                last.push(' ');
                last.push_str(part);
            }
            None => all.push(part.to_owned()),
        }
        goes_on = more;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_stage_speaks() {
        let text = "FROM rust AS b\nEXPOSE 1\nARG APP_VERSION\n# c\nFROM scratch\nexpose 8080/tcp $P 53/udp \\\n  9090\n\
            HEALTHCHECK --interval=3s \\\n  CMD [\"wget\", \"-qO-\", \"http://localhost:8080/up\"]\n";
        let found = read(text);
        assert_eq!(found.ports, [8080, 9090]);
        assert_eq!(found.check, Some(Check::Http { port: 8080, path: "/up".into() }));
        assert!(found.takes_version);
    }
}
