//! What is counted, and what it is called.

/// An enum of which each variant has a label: that of a counter, as the Python engine has it. `ALL` has them in the order of
/// their numbers.
macro_rules! labelled {
    ($(#[$of_all:meta])* $visibility:vis enum $name:ident {
        $($(#[$of_one:meta])* $variant:ident => $label:literal,)+
    }) => {
        $(#[$of_all])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        $visibility enum $name {
            $($(#[$of_one])* $variant,)+
        }

        impl $name {
            pub const ALL: [Self; [$($label),+].len()] = [$(Self::$variant),+];

            #[must_use]
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)+
                }
            }
        }
    };
}

pub(crate) use labelled;
