/* What the page looks like. */
#define PAGE_TITLE "A plank of oak"
#define PAGE_BACKGROUND "#f4efe6"
#define PAGE_COLOUR "#2b2b2b"
