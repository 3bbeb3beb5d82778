//! Capabilities as a set of bits, the kernel's own form.

/// A bit for each capability, `1 << CAP_*`.
pub type Set = u64;

macro_rules! capabilities {
    ($($name:ident = $number:literal,)*) => {
        $(pub const $name: Set = 1 << $number;)*
        const NAMES: &[(&str, Set)] = &[$((stringify!($name), $name)),*];
    };
}

capabilities! {
    CHOWN = 0, DAC_OVERRIDE = 1, DAC_READ_SEARCH = 2, FOWNER = 3, FSETID = 4, KILL = 5, SETGID = 6, SETUID = 7,
    SETPCAP = 8, LINUX_IMMUTABLE = 9, NET_BIND_SERVICE = 10, NET_BROADCAST = 11, NET_ADMIN = 12, NET_RAW = 13,
    IPC_LOCK = 14, IPC_OWNER = 15, SYS_MODULE = 16, SYS_RAWIO = 17, SYS_CHROOT = 18, SYS_PTRACE = 19,
    SYS_PACCT = 20, SYS_ADMIN = 21, SYS_BOOT = 22, SYS_NICE = 23, SYS_RESOURCE = 24, SYS_TIME = 25,
    SYS_TTY_CONFIG = 26, MKNOD = 27, LEASE = 28, AUDIT_WRITE = 29, AUDIT_CONTROL = 30, SETFCAP = 31,
    MAC_OVERRIDE = 32, MAC_ADMIN = 33, SYSLOG = 34, WAKE_ALARM = 35, BLOCK_SUSPEND = 36, AUDIT_READ = 37,
    PERFMON = 38, BPF = 39, CHECKPOINT_RESTORE = 40,
}

/// What docker gives a container.
pub const DEFAULT: Set = CHOWN
    | DAC_OVERRIDE
    | FSETID
    | FOWNER
    | MKNOD
    | NET_RAW
    | SETGID
    | SETUID
    | SETFCAP
    | SETPCAP
    | NET_BIND_SERVICE
    | SYS_CHROOT
    | KILL
    | AUDIT_WRITE;

/// Every capability, also those of kernels to come: the kernel's bounding set cuts it down.
pub const ALL: Set = Set::MAX;

/// `NET_ADMIN`, `cap_net_admin` or `ALL`.
pub fn parse(name: &str) -> Option<Set> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if bare == "ALL" {
        return Some(ALL);
    }
    NAMES.iter().find(|(known, _)| *known == bare).map(|&(_, bit)| bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_with_and_without_prefix() {
        assert_eq!(parse("NET_ADMIN"), Some(1 << 12));
        assert_eq!(parse("cap_sys_admin"), Some(SYS_ADMIN));
        assert_eq!(parse("all"), Some(ALL));
        assert_eq!(parse("CAP_NONSENSE"), None);
    }

    #[test]
    fn the_default_set_is_docker_s() {
        assert_eq!(DEFAULT, 0xa80425fb);
    }
}
